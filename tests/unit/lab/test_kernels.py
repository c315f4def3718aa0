"""The emulated host's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import cache, initrd, kernels


def bzimage(release: str) -> bytes:
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x300 - 0x200).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1\0".encode()
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head)


def test_kernel_release(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("6.12.1-own"))
    assert kernels.kernel_release(tmp_path / "bzImage") == "6.12.1-own"


def test_a_file_that_is_not_a_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel")
    with pytest.raises(LabError, match="not a Linux kernel"):
        kernels.kernel_release(tmp_path / "text")
    with pytest.raises(LabError, match="No such file"):
        kernels.kernel_release(tmp_path / "nothing")


def test_full_is_built_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.FULL_VARIABLE, raising=False)
    with pytest.raises(LabError) as caught:
        kernels.find("full", print)
    assert "kvmpass lab kernel" in caught.value.__notes__[0]


@pytest.mark.skipif(cache.find_tool("depmod") is None, reason="no depmod: apt-get install kmod makes it run")
def test_a_built_kernel_lists_its_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("6.12.1-own"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/vfio/pci/vfio-pci.ko\n")
    monkeypatch.setenv(kernels.FULL_VARIABLE, str(tmp_path / "bzImage"))
    kernel = kernels.find("full", print)
    assert (kernel.name, kernel.release) == ("full", "6.12.1-own")
    assert kernel.modules is not None
    assert kernel.modules.parts[-3:] == ("lib", "modules", "6.12.1-own")
    assert (kernel.modules / "modules.builtin.bin").is_file()
    assert initrd.root_modules(kernel) == []


def test_a_kernel_tree_is_found(tmp_path: Path) -> None:
    assert kernels.cached(tmp_path, "stock") is None
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-6.12-x").touch()
    (tmp_path / "lib" / "modules" / "6.12-x").mkdir(parents=True)
    kernel = kernels.cached(tmp_path, "stock")
    assert kernel is not None
    assert kernel.release == "6.12-x"
    assert kernel.modules == tmp_path / "lib" / "modules" / "6.12-x"
    assert kernel.config is None
