"""The full description of one device, as ``kvmpass show`` prints it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvmpass._dataclass import dataclass, replace
from kvmpass.errors import NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.backend import BackendChoice, choose_backend
from kvmpass.host.blockers.use import ASSIGNED
from kvmpass.host.drivers.driverctl import saved_override
from kvmpass.host.look import Look
from kvmpass.host.sysfs import (
    BARS,
    IORESOURCE_IO,
    IORESOURCE_MEM,
    IORESOURCE_MEM_64,
    PCI_DEVICES,
    IommuGroup,
    PciDevice,
    Resource,
    Sysfs,
)
from kvmpass.host.usage import Use, untraced, uses
from kvmpass.host.view.capabilities import Capabilities, capabilities_of
from kvmpass.host.view.inventory import DeviceStatus, HostStatus, device_status, host_status
from kvmpass.host.view.isolation import Bridge, Sibling, bridges_above, siblings

# include/linux/ioport.h, include/linux/pci.h (enum of resource numbers)
_PREFETCH = 0x2000
_ROM, _VF_BARS, _WINDOWS = BARS, 7, 4


@dataclass(frozen=True, slots=True)
class BarInfo:
    """A BAR, the expansion ROM, a VF BAR, or a bridge window."""

    name: str
    """``bar0``, ``rom``, ``vf-bar0``, ``window0``."""
    io: bool
    """I/O ports, not memory."""
    bits: int | None
    """Width of its addresses, 32 or 64; None for I/O ports."""
    prefetchable: bool
    """Prefetchable memory."""
    address: int | None
    """Host-physical address; None if the kernel has not assigned one."""
    size: int
    """Bytes; of a VF BAR for all virtual functions together."""


@dataclass(frozen=True, slots=True)
class Description:
    """One device, its IOMMU group and its upstream bridges at one moment."""

    status: DeviceStatus
    """The device, its names and blockers."""
    host: HostStatus
    """Whether this host can assign devices."""
    backend: BackendChoice
    """The IOMMU back end that a machine with this device would use."""
    subsystem_name: str | None
    """The name of the card or board; None if unknown."""
    driverctl: str | None
    """The driver that driverctl binds at each boot (``none``: no driver); None without driverctl."""
    bars: tuple[BarInfo, ...]
    """BARs, ROM and windows that are in use."""
    capabilities: Capabilities
    """The capabilities in configuration space."""
    group: IommuGroup | None
    """The IOMMU group; None without one."""
    siblings: tuple[Sibling, ...]
    """The other devices of the group, by address."""
    bridges: tuple[Bridge, ...]
    """The bridges between the device and the root bus, nearest first."""
    functions: tuple[Bdf, ...]
    """The other functions of the same physical device, without virtual functions."""
    uses: tuple[str, ...]
    """What the host uses the device for, or which process has it assigned, one clause each."""
    possible_uses: tuple[str, ...]
    """Why the device may be in use although no use is visible, one clause each."""
    complete: bool
    """Whether this user sees all processes and registers, as root does."""


def describe(sysfs: Sysfs, bdf: Bdf, look: Look | None = None) -> Description:
    """Describe a device. Only reads. For many devices, pass one ``look``. Raises ``NoSuchDevice``."""
    device = sysfs.device(bdf)
    look = look or Look(sysfs)
    saved = saved_override(sysfs, bdf)
    group, found, status = _group(sysfs, device), uses(look, device), device_status(look, device)
    return Description(
        status=status,
        host=look.remembered("host status", lambda look: host_status(look.sysfs)),
        backend=choose_backend(sysfs, [bdf]),
        subsystem_name=look.names.subsystem(device),
        driverctl=saved.driver if saved else None,
        bars=tuple(bars(device)),
        capabilities=capabilities_of(sysfs, bdf),
        group=group,
        siblings=tuple(siblings(look, device, group)) if group else (),
        bridges=tuple(bridges_above(sysfs, bdf)),
        functions=tuple(_functions(sysfs, bdf)),
        uses=(*_assigned(status), *(use.text for use in found if use.seen)),
        possible_uses=tuple(_possible_uses(look, device, found)),
        complete=sysfs.ask("privileged", lambda: os.geteuid() == 0),
    )


def _assigned(status: DeviceStatus) -> Iterator[str]:
    """Which process has the device, or another of its group, open through VFIO."""
    for blocker in status.blockers:
        if blocker.kind == ASSIGNED.kind:
            yield blocker.cause.removeprefix(f"{status.device.bdf} ").removeprefix("is ")


def _possible_uses(look: Look, device: PciDevice, found: list[Use]) -> Iterator[str]:
    yield from (use.text for use in found if not use.seen)
    note = "" if found else untraced(look, device)  # only if no use is known
    if note:
        yield note


def _group(sysfs: Sysfs, device: PciDevice) -> IommuGroup | None:
    try:
        return None if device.group is None else sysfs.group(device.group)
    except NotAssignable:  # it was removed concurrently
        return None


def _functions(sysfs: Sysfs, bdf: Bdf) -> Iterator[Bdf]:
    """Yield the other functions. Only function 0 has the multifunction bit, so each address is tried."""
    if sysfs.link(PCI_DEVICES, str(bdf), "physfn") is not None:
        return
    for number in range(8):
        other = replace(bdf, function=number)
        present = sysfs.text(PCI_DEVICES, str(other), "vendor") is not None
        if present and other != bdf and sysfs.link(PCI_DEVICES, str(other), "physfn") is None:
            yield other


def bars(device: PciDevice) -> Iterator[BarInfo]:
    """Yield what ``resource`` in sysfs lists: six BARs, the ROM, six VF BARs, the windows of a bridge last."""
    windows = len(device.resources) - _WINDOWS if device.is_pci_bridge else len(device.resources)
    for number, resource in enumerate(device.resources):
        if resource.size and resource.flags & (IORESOURCE_IO | IORESOURCE_MEM):
            yield _bar(_bar_name(number, windows), resource)


def _bar_name(number: int, windows: int) -> str:
    if number >= windows:
        return f"window{number - windows}"
    if number < _ROM:
        return f"bar{number}"
    return "rom" if number == _ROM else f"vf-bar{number - _VF_BARS}"


def _bar(name: str, resource: Resource) -> BarInfo:
    io = bool(resource.flags & IORESOURCE_IO)
    return BarInfo(
        name=name,
        io=io,
        bits=None if io else 64 if resource.flags & IORESOURCE_MEM_64 else 32,
        prefetchable=bool(resource.flags & _PREFETCH),
        address=resource.start if resource.is_placed else None,
        size=resource.size,
    )
