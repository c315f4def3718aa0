"""The device's BARs: whether they have addresses, and whether a boot framebuffer uses them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from kvmpass._dataclass import dataclass
from kvmpass.errors import NotAssignable
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.blockers.kind import header_type
from kvmpass.host.check import CheckContext, Reading, Verdict, device_precondition, failed, passed
from kvmpass.host.look import Look
from kvmpass.host.sysfs import BARS, IORESOURCE_MEM_64, PCI_DEVICES, PciDevice, Resource
from kvmpass.layout import Range, size_text

# Names of the resources of firmware framebuffer drivers in /proc/iomem (drivers/firmware/sysfb*.c,
# drivers/video/fbdev, drivers/gpu/drm/sysfb).
_FRAMEBUFFERS = frozenset(
    {"BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer", "simpledrm", "efidrm", "vesadrm"}
)
_DISPLAY = 0x03  # base class
_VGA = 0x0300
_REMOVES_FRAMEBUFFER = (6, 1)  # at the latest: vfio_pci_vga_init (drivers/vfio/pci/vfio_pci_core.c)

NO_ADDRESS = BlockerTemplate(
    kind="bar-no-address",
    brief="{count} without address",
    cause="{bdf}: the kernel has assigned no address to {bars}: a guest would get the device without it",
    remedy="turn on above-4G decoding in the firmware's setup (and resizable BARs, where it has that), or boot with "
    "pci=realloc on the kernel's command line; the kernel's log says which BARs did not fit",
    commands=("dmesg | grep {bdf}",),
    error=NotAssignable,
    bindable=True,
)
NO_PORTS = BlockerTemplate(
    kind="bar-no-ports",
    brief="{count} without ports",
    cause="{bdf}: the kernel has assigned no I/O ports to {bars}: a guest gets the device without it",
    remedy="disable other devices in the firmware's setup, or use another slot, if its driver uses the ports: most "
    "drivers do not",
    warning=True,
)
FRAMEBUFFER = BlockerTemplate(
    kind="boot-framebuffer",
    brief="{name} uses a BAR",
    cause="the firmware's framebuffer ({name}, {range}) is in a BAR of {bdf}: vfio-pci cannot request that BAR",
    remedy="boot with initcall_blacklist=sysfb_init on the kernel's command line; that display then has no console",
    error=NotAssignable,
    bindable=True,
)
FRAMEBUFFER_UNKNOWN = BlockerTemplate(
    kind="boot-framebuffer-unknown",
    brief="only root can see it",
    cause="there is a framebuffer of the firmware ({name}), and {bdf} is a display controller: only root can see "
    "whether it is in one of its BARs",
    remedy="run doctor again as root",
    warning=True,
)


def _memory(device: PciDevice) -> list[Range]:
    """Return the memory BARs that have an address."""
    return [Range(bar.start, bar.size) for bar in device.bars if bar.is_memory and bar.is_placed]


@dataclass(frozen=True, slots=True)
class _Unplaced:
    """A BAR without an address; ``size`` is in bytes, None if unknown."""

    index: int
    ports: bool
    size: int | None

    def __str__(self) -> str:
        return f"BAR {self.index}" + (f" ({size_text(self.size)})" if self.size else "")


def unplaced(look: Look, device: PciDevice, header: bytes) -> list[_Unplaced]:
    """Return the BARs of a function (not of a bridge) that the kernel has not assigned.

    The kernel keeps their sizes without an address (``IORESOURCE_UNSET``), or resets the resource (``0 0 0``). Then
    the BAR register still has its flags, except for a non-prefetchable 32-bit memory BAR: of these the kernel's log
    has a message. ``header`` is the first 64 bytes of configuration space, or empty.
    """
    found: list[_Unplaced] = []
    if not device.resources:  # unknown
        return found
    messages = look.unplaced_bars.get(device.bdf, {})
    registers = struct.unpack_from("<6I", header, 0x10) if len(header) >= 0x28 else (0,) * BARS
    upper = False  # this register is the upper half of the one before
    for index, register in enumerate(registers):
        if upper:
            upper = False
            continue
        bar = device.resources[index] if index < len(device.resources) else Resource(0, 0, 0)
        if bar.size:
            upper = bool(bar.flags & IORESOURCE_MEM_64)
            if not bar.is_placed:
                found.append(_Unplaced(index, not bar.is_memory, bar.size))
        elif register or index in messages:
            text = messages.get(index, "")
            ports = bool(register & 1) or text.startswith("io")
            upper = "64bit" in text or register & 0b111 == 0b100
            size = re.search(r"size (0x[0-9a-f]+)", text)
            found.append(_Unplaced(index, ports, int(size[1], 16) if size else None))
    return found


@device_precondition(
    "device-bars",
    "Addresses of its BARs",
    "`resource`, the BARs in `config`, the kernel's log",
    (NO_ADDRESS, NO_PORTS),
    needs=("device",),
)
def _addresses(context: CheckContext) -> Verdict:
    device, base = context.device, f"{PCI_DEVICES}/{context.bdf}"
    header = context.header
    if not header.strip(b"\xff") or header_type(header):  # no response, suspended; a bridge
        header = b""
    found = unplaced(context.look, device, header) if not device.is_bridge else []
    registers = header[0x10:0x28].hex(" ", 4) or "not read"
    read = [
        Reading(f"/{base}/resource", "; ".join(f"{bar.start:#x} {bar.end:#x} {bar.flags:#x}" for bar in device.bars)),
        Reading(f"/{base}/config", f"BARs {registers}"),
    ]
    for template, ports in ((NO_ADDRESS, False), (NO_PORTS, True)):
        bars = [bar for bar in found if bar.ports is ports]
        if bars:
            words, count = " and ".join(map(str, bars)), " ".join(f"BAR {bar.index}" for bar in bars)
            return failed(template, *read, bdf=device.bdf, bars=words, count=count)
    return passed("all have addresses", *read)


def _framebuffers(context: CheckContext) -> Iterator[tuple[str, Range, str]]:
    """Name, range and line of each; the range ends at 0 if its address is hidden."""
    for line in (context.look.text("proc/iomem") or "").splitlines():
        addresses, _, name = line.strip().partition(" : ")
        low, _, high = addresses.partition("-")
        if name in _FRAMEBUFFERS:
            try:
                yield name, Range(int(low, 16), int(high, 16) - int(low, 16) + 1), line.strip()
            except ValueError:
                continue


@device_precondition(
    "device-framebuffer",
    "Boot framebuffer",
    "`/proc/iomem` (addresses only for root), `resource`",
    (FRAMEBUFFER, FRAMEBUFFER_UNKNOWN),
    needs=("device",),
)
def _framebuffer(context: CheckContext) -> Verdict:
    device = context.device
    bars = _memory(device) if not device.is_bridge else []
    hidden = ""
    for name, framebuffer, line in _framebuffers(context):
        if framebuffer.last == 0:
            hidden = name
        elif any(bar.overlaps(framebuffer) for bar in bars):
            read = Reading("/proc/iomem", line)
            if device.class_code >> 8 == _VGA and context.sysfs.kernel() >= _REMOVES_FRAMEBUFFER:
                return passed(f"{name} uses a BAR: vfio-pci removes it", read)
            return failed(FRAMEBUFFER, read, bdf=device.bdf, name=name, range=framebuffer)
    if hidden and device.class_code >> 16 == _DISPLAY:
        read = Reading("/proc/iomem", f"{hidden}, address hidden")
        return failed(FRAMEBUFFER_UNKNOWN, read, bdf=device.bdf, name=hidden)
    return passed("none on its BARs", Reading("/proc/iomem", "no framebuffer of the firmware in its BARs"))


CHECKS = (_addresses, _framebuffer)
