"""What a guest's image is made of, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.kernel_files import bzimage, vmlinux

from kvmpass.boot.unpacking import Unpacking
from kvmpass.errors import BadKernel, KvmpassError, NotEnoughMemory
from kvmpass.guest import GuestImage, GuestSpec, prepare
from kvmpass.layout import MIB
from kvmpass.machine import Machine


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GuestSpec(initrd=Path("own"), session=True, copy=("/etc/hostname:/x",)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), session=True, modules=(Path("one.ko"),)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), command=("true",), copy_out=("/a",)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), session=True, root="host"), "mounts --root and --share"),
        (GuestSpec(initrd=Path("own"), session=True, shares=("/tmp",)), "mounts --root and --share"),
        (GuestSpec(initrd=Path("own"), session=True, copy_out=("/a",)), "sends files"),
    ],
)
def test_an_initramfs_of_the_users_own_gets_nothing_more(spec: GuestSpec, reason: str) -> None:
    """Nothing would use it: not even its kernel is looked for."""
    with pytest.raises(KvmpassError, match=reason):
        prepare(spec, ())


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        (None, ""),
        ("CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=m\nCONFIG_DEVTMPFS=y\n", ""),
        ("CONFIG_VIRTIO_PCI=y\n# CONFIG_VIRTIO_CONSOLE is not set\n", "CONFIG_VIRTIO_CONSOLE, CONFIG_DEVTMPFS"),
    ],
)
def test_a_kernel_without_a_port_for_the_agent_beside_an_init(tmp_path: Path, text: str | None, lacking: str) -> None:
    """It is refused, not waited for, if its configuration is known."""
    (tmp_path / "bzImage").write_bytes(bzimage())
    (tmp_path / "own").write_bytes(b"own")
    if text is not None:
        (tmp_path / "config-6.12.1-test").write_text(text)
    spec = GuestSpec(kernel=tmp_path / "bzImage", initrd=tmp_path / "own", session=True)
    if not lacking:
        assert prepare(spec, ()).initrd.endswith(b"own")
        return
    with pytest.raises(BadKernel, match=f"^kernel 6.12.1-test lacks {lacking}, which the agent"):
        prepare(spec, ())


def test_a_kernel_is_decompressed_early_for_a_machine_that_it_fits_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a file that asks for more than the guest has, nor for a machine of another VMM."""
    begun: list[Unpacking] = []
    monkeypatch.setattr(Unpacking, "begin", lambda run: begun.append(run))
    (tmp_path / "bzImage").write_bytes(bzimage())
    (tmp_path / "own").write_bytes(b"own")
    spec = GuestSpec(kernel=tmp_path / "bzImage", initrd=tmp_path / "own")
    image = prepare(spec, ())
    end = image.kernel.preferred + image.kernel.init_size
    prepare(spec, (), end - 1)
    assert not begun and image.unpacking is not None
    assert image.on_serial_ports().unpacking is None
    assert [prepare(spec, (), end).unpacking] == begun
    (tmp_path / "bzImage").write_bytes(vmlinux((16 * MIB, b"Linux version 6.12.1 (me) #1\n", 4096)))
    assert prepare(spec, (), end).unpacking is None


def test_what_was_prepared_of_a_kernel_is_released_if_it_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds an open file of the cache, or the kernel."""
    cancelled: list[Unpacking] = []
    monkeypatch.setattr(Unpacking, "begin", lambda run: None)
    monkeypatch.setattr(Unpacking, "cancel", lambda run: cancelled.append(run))
    (tmp_path / "bzImage").write_bytes(bzimage())
    spec = GuestSpec(kernel=tmp_path / "bzImage", initrd=tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        prepare(spec, (), 1 << 40)
    assert len(cancelled) == 1
    (tmp_path / "missing").write_bytes(b"own")
    image = prepare(spec, (), 1 << 40)
    assert len(cancelled) == 1
    with pytest.raises(NotEnoughMemory):
        image.load(cast(Machine, SimpleNamespace(memory=SimpleNamespace(ram_size=MIB))))
    assert cancelled[1:] == [image.unpacking]


def test_a_kernel_with_kaslr_decompresses_itself(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bzimage())
    (tmp_path / "own").write_bytes(b"own")
    spec = GuestSpec(kernel=kernel, initrd=tmp_path / "own", kaslr=True)
    assert prepare(spec, (), 1 << 40).unpacking is None
    kernel.write_bytes(vmlinux((16 * MIB, b"Linux version 6.12.1 (me) #1\n", 4096)))
    with pytest.raises(BadKernel, match="a vmlinux starts where it was linked to, without KASLR") as refused:
        prepare(spec, ())
    assert "leave --kaslr out" in refused.value.__notes__[0]


def test_an_assigned_serial_card_gets_ports(tmp_path: Path) -> None:
    """Before Linux 6.2, only those below ``8250.nr_uarts`` that COM1 to COM4 do not take."""
    (tmp_path / "bzImage").write_bytes(bzimage())
    (tmp_path / "config-6.12.1-test").write_text("CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=y\n")
    spec = GuestSpec(kernel=tmp_path / "bzImage", command=("true",))
    drive = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
    card = "pci:v00001B36d00000004sv00001AF4sd00001100bc07sc80i02"

    def uarts(image: GuestImage) -> list[str]:
        return [word for word in image.cmdline.split() if "nr_uarts" in word]

    without, one, two = (prepare(spec, [drive, *[card] * count]) for count in range(3))
    assert [uarts(image) for image in (without, one, two)] == [[f"8250.nr_uarts={count}"] for count in (1, 12, 20)]
    assert {image.serial_ports for image in (without, one, two)} == {1}
    others = [image.on_serial_ports() for image in (without, one, two)]
    assert [uarts(image) for image in others] == [[f"8250.nr_uarts={count}"] for count in (4, 12, 20)]
    assert {image.serial_ports for image in others} == {4}
