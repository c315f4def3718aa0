"""A guest of kvmpass's own image under QEMU's q35 machine: its command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmpass.guest import GuestImage
from kvmpass.ports import SERIAL_LINES


def qemu_words(program: Sequence[str], image: GuestImage, folder: Path, memory: str) -> list[str]:
    """``program`` and its arguments, but for devices.

    The guest's serial ports are the files ``serial0`` … in ``folder``: its console, its command's output and errors,
    the control channel.
    """
    image = image.on_serial_ports()
    initrd = folder / "initrd"
    initrd.write_bytes(image.initrd)
    words = [*program, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", memory]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-kernel", str(image.kernel.path), "-initrd", str(initrd), "-append", image.cmdline]
    for index, line in enumerate(SERIAL_LINES):
        # Lines of their own for all four: the PC's shared ones are of no use to Linux.
        place = f"iobase={line.port:#x},irq={line.irq},index={index}"
        words += ["-chardev", f"file,id=serial{index},path={folder / f'serial{index}'}"]
        words += ["-device", f"isa-serial,chardev=serial{index},{place}"]
    return words
