"""The device's BARs: who else claims them."""

from __future__ import annotations

from collections.abc import Iterator

from kvmpass.errors import NotAssignable
from kvmpass.host.check import Check, Examined, Reading, Verdict, bad, good
from kvmpass.host.problems import Problem
from kvmpass.host.sysfs import BARS, PciDevice
from kvmpass.layout import Range

# What drivers for the firmware's framebuffer call their part of a BAR in /proc/iomem (drivers/firmware/sysfb*.c,
# drivers/video/fbdev, drivers/gpu/drm/sysfb).
_FRAMEBUFFERS = frozenset(
    {"BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer", "simpledrm", "efidrm", "vesadrm"}
)
_DISPLAY = 0x03  # base class
_VGA = 0x0300
_TAKES_CONSOLES = (6, 1)  # surely by then: vfio_pci_vga_init (drivers/vfio/pci/vfio_pci_core.c)

FRAMEBUFFER = Problem(
    kind="boot-framebuffer",
    brief="{name} sits on it",
    cause="the firmware's framebuffer ({name}, {range}) lies in a BAR of {bdf}: vfio-pci cannot claim that BAR",
    remedy="boot with initcall_blacklist=sysfb_init on the kernel's command line; that display then has no console",
    error=NotAssignable,
    bindable=True,
)
FRAMEBUFFER_UNKNOWN = Problem(
    kind="boot-framebuffer-unknown",
    brief="only root can tell",
    cause="there is a framebuffer of the firmware ({name}), and {bdf} is a display: only root sees whether it lies "
    "in a BAR of it",
    remedy="ask again as root",
    warning=True,
)


def _memory(device: PciDevice) -> list[Range]:
    """The BARs in memory that have an address."""
    found = device.resources[:BARS]
    return [Range(part.start, part.size) for part in found if part.is_memory and part.is_placed]


def _framebuffers(examined: Examined) -> Iterator[tuple[str, Range, str]]:
    """Name, place and line of each; from 0 to 0 where its address is hidden."""
    for line in (examined.look.text("proc/iomem") or "").splitlines():
        place, _, name = line.strip().partition(" : ")
        low, _, high = place.partition("-")
        if name in _FRAMEBUFFERS:
            try:
                yield name, Range(int(low, 16), int(high, 16) - int(low, 16) + 1), line.strip()
            except ValueError:
                continue


def _framebuffer(examined: Examined) -> Verdict:
    device = examined.device
    bars = _memory(device) if not device.is_bridge else []
    hidden = ""
    for name, here, line in _framebuffers(examined):
        if here.last == 0:
            hidden = name
        elif any(bar.overlaps(here) for bar in bars):
            read = Reading("/proc/iomem", line)
            if device.class_code >> 8 == _VGA and examined.sysfs.kernel() >= _TAKES_CONSOLES:
                return good(f"{name} sits on it: vfio-pci takes the console away", read)
            return bad(FRAMEBUFFER, read, bdf=device.bdf, name=name, range=here)
    if hidden and device.class_code >> 16 == _DISPLAY:
        read = Reading("/proc/iomem", f"{hidden}, address hidden")
        return bad(FRAMEBUFFER_UNKNOWN, read, bdf=device.bdf, name=hidden)
    return good("none on its BARs", Reading("/proc/iomem", "no framebuffer of the firmware in its BARs"))


CHECKS = (
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
