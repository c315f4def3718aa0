"""The host's console: its display, its keyboard, its serial line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvmpass.host.address import Bdf
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PCI_DEVICES, PciDevice
from kvmpass.host.usage import Use
from kvmpass.host.usage.shares import VIRTIO

_LETTERS = 0xFFFF_FFFE  # keys 1 to 31: a keyboard has them, a power button does not (the test of udev's input_id)


def console(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield uses as boot display, text console, console keyboard, serial and virtio console."""
    sysfs, base = look.sysfs, f"{PCI_DEVICES}/{device.bdf}"
    shows = look.attributes(device.bdf) & {"boot_vga", "boot_display"}
    if any(sysfs.text(base, name) == "1" for name in shows):
        yield Use("it is the boot display of this host")
    elif "fb0" in look.below("sys/class/graphics", device.bdf) and _text_console(look):
        yield Use("the text console is on it (fb0)")
    for keyboard in _keyboards(look, device.bdf):
        yield Use(f"the console reads the keyboard {keyboard}")
    consoles = _consoles(look)
    for name in look.below("sys/class/tty", device.bdf):
        if name in consoles:
            yield Use(f"the kernel's console is on {name}")
    if any(sysfs.link(VIRTIO, name, "driver") == "virtio_console" for name in look.below(VIRTIO, device.bdf)):
        lines = [name for name in sorted(consoles) if name.startswith("hvc")]
        yield from (Use(f"the kernel's console is on {name}, probably on this device") for name in lines)


def _text_console(look: Look) -> bool:
    """Whether consoles are on frame buffers (drivers/video/fbdev/core/fbcon.c), which begin with the first."""
    base = "sys/class/vtconsole"
    return any(
        "frame buffer" in (look.sysfs.text(base, name, "name") or "") and look.sysfs.text(base, name, "bind") == "1"
        for name in look.sysfs.names(base)
    )


def _consoles(look: Look) -> set[str]:
    found = {line.split()[0] for line in (look.text("proc/consoles") or "").splitlines() if line.split()}
    return found | set((look.text("sys/class/tty/console/active") or "").split())


def _keyboards(look: Look, bdf: Bdf) -> Iterator[str]:
    """Keyboards that the console's input handler has opened (drivers/tty/vt/keyboard.c: kbd_match)."""
    for block in (look.text("proc/bus/input/devices") or "").split("\n\n"):
        lines = {line[:1] + line[3:].partition("=")[0]: line[3:].partition("=")[2] for line in block.splitlines()}
        keys = lines.get("BKEY", "").split()
        if (
            f"/{bdf}/" in lines.get("SSysfs", "")
            and "kbd" in lines.get("HHandlers", "").split()
            and (not keys or int(keys[-1], 16) & _LETTERS == _LETTERS)
        ):
            yield lines.get("NName", "").strip('"') or re.sub(r".*/", "", lines["SSysfs"])
