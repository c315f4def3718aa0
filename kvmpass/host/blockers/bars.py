"""The device's BARs: whether they have addresses, and who else claims them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpass.errors import NotAssignable
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import Check, CheckContext, Reading, Verdict, failed, passed
from kvmpass.host.look import Look
from kvmpass.host.sysfs import BARS, IORESOURCE_MEM_64, PCI_DEVICES, PciDevice, Resource, header_type
from kvmpass.layout import Range, size_words

# What drivers for the firmware's framebuffer call their part of a BAR in /proc/iomem (drivers/firmware/sysfb*.c,
# drivers/video/fbdev, drivers/gpu/drm/sysfb).
_FRAMEBUFFERS = frozenset(
    {"BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer", "simpledrm", "efidrm", "vesadrm"}
)
_DISPLAY = 0x03  # base class
_VGA = 0x0300
_TAKES_CONSOLES = (6, 1)  # surely by then: vfio_pci_vga_init (drivers/vfio/pci/vfio_pci_core.c)

NO_ADDRESS = BlockerTemplate(
    kind="bar-no-address",
    brief="{count} without address",
    cause="{bdf}: this kernel found no address for {bars}: a guest would get the device without it",
    remedy="turn on above-4G decoding in the firmware's setup (and resizable BARs, where it has that), or boot with "
    "pci=realloc on the kernel's command line; the kernel's log says what did not fit",
    commands=("dmesg | grep {bdf}",),
    error=NotAssignable,
    bindable=True,
)
NO_PORTS = BlockerTemplate(
    kind="bar-no-ports",
    brief="{count} without ports",
    cause="{bdf}: this kernel found no I/O ports for {bars}: a guest gets the device without it",
    remedy="none is needed for most devices, whose drivers do without ports; else turn off other devices in the "
    "firmware's setup, or use another slot",
    warning=True,
)
FRAMEBUFFER = BlockerTemplate(
    kind="boot-framebuffer",
    brief="{name} sits on it",
    cause="the firmware's framebuffer ({name}, {range}) lies in a BAR of {bdf}: vfio-pci cannot claim that BAR",
    remedy="boot with initcall_blacklist=sysfb_init on the kernel's command line; that display then has no console",
    error=NotAssignable,
    bindable=True,
)
FRAMEBUFFER_UNKNOWN = BlockerTemplate(
    kind="boot-framebuffer-unknown",
    brief="only root can tell",
    cause="there is a framebuffer of the firmware ({name}), and {bdf} is a display: only root sees whether it lies "
    "in a BAR of it",
    remedy="ask again as root",
    warning=True,
)


def _memory(device: PciDevice) -> list[Range]:
    """The BARs in memory that have an address."""
    return [Range(part.start, part.size) for part in device.bars if part.is_memory and part.is_placed]


@dataclass(frozen=True, slots=True)
class _Unplaced:
    """A BAR that has no address; ``size`` in bytes is None where nobody says."""

    index: int
    ports: bool
    size: int | None

    def __str__(self) -> str:
        return f"BAR {self.index}" + (f" ({size_words(self.size)})" if self.size else "")


def unplaced(look: Look, device: PciDevice, header: bytes) -> list[_Unplaced]:
    """Which BARs of a function (not of a bridge) the kernel could not place.

    It keeps their sizes without an address (``IORESOURCE_UNSET``), or forgets them (``0 0 0`` in ``resource``). Then
    the register tells, which keeps its flags: an implemented one reads as 0 only where it is for 32-bit memory that
    cannot be prefetched, and of that the kernel's log tells. ``header`` is the beginning of configuration space, or
    empty.
    """
    found: list[_Unplaced] = []
    if not device.resources:  # nobody says
        return found
    said = look.unplaced_bars.get(device.bdf, {})
    registers = struct.unpack_from("<6I", header, 0x10) if len(header) >= 0x28 else (0,) * BARS
    upper = False  # this register is the upper half of the one before
    for index, register in enumerate(registers):
        if upper:
            upper = False
            continue
        part = device.resources[index] if index < len(device.resources) else Resource(0, 0, 0)
        if part.size:
            upper = bool(part.flags & IORESOURCE_MEM_64)
            if not part.is_placed:
                found.append(_Unplaced(index, not part.is_memory, part.size))
        elif register or index in said:
            text = said.get(index, "")
            ports = bool(register & 1) or text.startswith("io")
            upper = "64bit" in text or register & 0b111 == 0b100
            size = re.search(r"size (0x[0-9a-f]+)", text)
            found.append(_Unplaced(index, ports, int(size[1], 16) if size else None))
    return found


def _addresses(context: CheckContext) -> Verdict:
    device, base = context.device, f"{PCI_DEVICES}/{context.bdf}"
    header = context.header
    if not header.strip(b"\xff") or header_type(header):  # silent, asleep; a bridge
        header = b""
    found = unplaced(context.look, device, header) if not device.is_bridge else []
    registers = header[0x10:0x28].hex(" ", 4) or "not read"
    read = [
        Reading(f"/{base}/resource", "; ".join(f"{one.start:#x} {one.end:#x} {one.flags:#x}" for one in device.bars)),
        Reading(f"/{base}/config", f"BARs {registers}"),
    ]
    for template, ports in ((NO_ADDRESS, False), (NO_PORTS, True)):
        bars = [one for one in found if one.ports is ports]
        if bars:
            words, count = " and ".join(map(str, bars)), " ".join(f"BAR {one.index}" for one in bars)
            return failed(template, *read, bdf=device.bdf, bars=words, count=count)
    return passed("all have addresses", *read)


def _framebuffers(context: CheckContext) -> Iterator[tuple[str, Range, str]]:
    """Name, place and line of each; from 0 to 0 where its address is hidden."""
    for line in (context.look.text("proc/iomem") or "").splitlines():
        place, _, name = line.strip().partition(" : ")
        low, _, high = place.partition("-")
        if name in _FRAMEBUFFERS:
            try:
                yield name, Range(int(low, 16), int(high, 16) - int(low, 16) + 1), line.strip()
            except ValueError:
                continue


def _framebuffer(context: CheckContext) -> Verdict:
    device = context.device
    bars = _memory(device) if not device.is_bridge else []
    hidden = ""
    for name, here, line in _framebuffers(context):
        if here.last == 0:
            hidden = name
        elif any(bar.overlaps(here) for bar in bars):
            read = Reading("/proc/iomem", line)
            if device.class_code >> 8 == _VGA and context.sysfs.kernel() >= _TAKES_CONSOLES:
                return passed(f"{name} sits on it: vfio-pci takes the console away", read)
            return failed(FRAMEBUFFER, read, bdf=device.bdf, name=name, range=here)
    if hidden and device.class_code >> 16 == _DISPLAY:
        read = Reading("/proc/iomem", f"{hidden}, address hidden")
        return failed(FRAMEBUFFER_UNKNOWN, read, bdf=device.bdf, name=hidden)
    return passed("none on its BARs", Reading("/proc/iomem", "no framebuffer of the firmware in its BARs"))


CHECKS = (
    Check(
        "device-bars",
        "Addresses of its BARs",
        "`resource`, the BARs in `config`, the kernel's log",
        (NO_ADDRESS, NO_PORTS),
        _addresses,
        ("device",),
        device=True,
    ),
    Check(
        "device-framebuffer",
        "Boot framebuffer",
        "`/proc/iomem` (addresses only for root), `resource`",
        (FRAMEBUFFER, FRAMEBUFFER_UNKNOWN),
        _framebuffer,
        ("device",),
        device=True,
    ),
)
