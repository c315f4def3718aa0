"""What ``--kernel`` may name: a bzImage, a vmlinux, a build tree, a directory in /lib/modules."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.kernel_files import bzimage, vmlinux

from kvmpass.errors import BadKernel
from kvmpass.guest.kernel import find_kernel
from kvmpass.guest.options import KernelOptions
from kvmpass.initramfs.buildtree import BuildTree
from kvmpass.layout import MIB

RELEASE = "6.12.1-test"


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def test_a_bzimage_has_the_hosts_modules(tmp_path: Path) -> None:
    write(tmp_path / "bzImage", bzimage())
    found = find_kernel(tmp_path / "bzImage")
    assert (found.image.release, found.symbols) == (RELEASE, None)
    assert found.modules.directory == Path("/lib/modules", RELEASE)


def test_a_vmlinux_has_them_too_and_symbols(tmp_path: Path) -> None:
    write(tmp_path / "vmlinux", vmlinux((16 * MIB, f"Linux version {RELEASE} (me) #1\n".encode(), 4096)))
    found = find_kernel(tmp_path / "vmlinux")
    assert (found.image.release, found.symbols) == (RELEASE, tmp_path / "vmlinux")
    assert found.modules.directory == Path("/lib/modules", RELEASE)
    assert not KernelOptions.of(found.image).known
    write(tmp_path / ".config", "CONFIG_PCI_MMCONFIG=y\n")
    assert KernelOptions.of(found.image).built_in("PCI_MMCONFIG")


def test_a_build_tree(tmp_path: Path) -> None:
    write(tmp_path / "include/config/kernel.release", RELEASE + "\n")
    with pytest.raises(BadKernel, match="has no arch/x86/boot/bzImage") as error:
        find_kernel(tmp_path)
    assert error.value.__notes__ == [f"build it: make -C {tmp_path} bzImage"]
    write(tmp_path / "arch/x86/boot/bzImage", bzimage())
    found = find_kernel(tmp_path)
    assert isinstance(found.modules, BuildTree)
    assert (found.modules.release, found.modules.directory, found.symbols) == (RELEASE, tmp_path, None)
    write(tmp_path / "vmlinux", b"\x7fELF")
    assert find_kernel(tmp_path).symbols == tmp_path / "vmlinux"
    write(tmp_path / "include/config/kernel.release", "6.12.1-newer\n")
    with pytest.raises(BadKernel, match=r"is kernel 6\.12\.1-test, the modules of the tree are for 6\.12\.1-newer"):
        find_kernel(tmp_path)


@pytest.mark.parametrize("image", [f"lib/modules/{RELEASE}/vmlinuz", f"boot/vmlinuz-{RELEASE}"])
@pytest.mark.parametrize("place", ["lib", "usr/lib"])
def test_an_installed_kernel(tmp_path: Path, image: str, place: str) -> None:
    directory = tmp_path / place / "modules" / RELEASE
    write(directory / "modules.dep", "")
    with pytest.raises(BadKernel, match="was not found: neither"):
        find_kernel(directory)
    write(tmp_path / image.replace("lib/", f"{place}/"), bzimage())
    found = find_kernel(directory)
    assert (found.image.release, found.modules.directory) == (RELEASE, directory)
    assert found.modules.exists


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKernel, match=r"has neither arch/x86/boot/bzImage nor modules\.dep"):
        find_kernel(tmp_path)
    with pytest.raises(FileNotFoundError) as missing:
        find_kernel(tmp_path / "nothing")
    assert "--kernel" in missing.value.__notes__[0]
