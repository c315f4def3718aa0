"""Everything about one device: what ``kvmpass show`` tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvmpass.errors import NotAssignable
from kvmpass.host.address import Bdf
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
    """A BAR, the expansion ROM, a BAR for virtual functions (its size is that for all of them), a bridge's window.

    ``name`` is ``bar0``, ``rom``, ``vf-bar0``, ``window0``; ``bits`` 32 or 64, None for I/O ports; ``address`` is
    host-physical, None where the host has assigned none. ``size`` is in bytes.
    """

    name: str
    io: bool
    bits: int | None
    prefetchable: bool
    address: int | None
    size: int


@dataclass(frozen=True, slots=True)
class Description:
    """One device and its surroundings at one moment.

    ``driverctl`` is the driver that driverctl binds at each boot (``none``: no driver), ``uses`` what the host does
    with the device, or which process has assigned it, a clause each, ``unseen`` why it may be in use all the same,
    ``functions`` the other functions of the same physical device (no virtual ones). ``complete``: this user sees the
    processes and the registers of all.
    """

    status: DeviceStatus
    host: HostStatus
    subsystem_name: str | None
    driverctl: str | None
    bars: tuple[BarInfo, ...]
    capabilities: Capabilities
    group: IommuGroup | None
    siblings: tuple[Sibling, ...]
    bridges: tuple[Bridge, ...]
    functions: tuple[Bdf, ...]
    uses: tuple[str, ...]
    unseen: tuple[str, ...]
    complete: bool


def describe(sysfs: Sysfs, bdf: Bdf, look: Look | None = None) -> Description:
    """Only reads. Whoever asks about many devices passes one ``look``. Raises ``NoSuchDevice``."""
    device = sysfs.device(bdf)
    look = look or Look(sysfs)
    saved = saved_override(sysfs, bdf)
    group, found, status = _group(sysfs, device), uses(look, device), device_status(look, device)
    return Description(
        status=status,
        host=look.remembered("host status", lambda look: host_status(look.sysfs)),
        subsystem_name=look.names.subsystem(device),
        driverctl=saved.driver if saved else None,
        bars=tuple(bars(device)),
        capabilities=capabilities_of(sysfs, bdf),
        group=group,
        siblings=tuple(siblings(sysfs, device, group)) if group else (),
        bridges=tuple(bridges_above(sysfs, bdf)),
        functions=tuple(_functions(sysfs, bdf)),
        uses=(*_assigned(status), *(use.text for use in found if use.seen)),
        unseen=tuple(_unseen(look, device, found)),
        complete=sysfs.ask("privileged", lambda: os.geteuid() == 0),
    )


def _assigned(status: DeviceStatus) -> Iterator[str]:
    """Who has it through VFIO, or another device of its group: no use by the host, and the device is not free."""
    for blocker in status.blockers:
        if blocker.kind == ASSIGNED.kind:
            yield blocker.cause.removeprefix(f"{status.device.bdf} ").removeprefix("is ")


def _unseen(look: Look, device: PciDevice, found: list[Use]) -> Iterator[str]:
    yield from (use.text for use in found if not use.seen)
    note = "" if found else untraced(look, device)  # of interest only where nothing else says that it is in use
    if note:
        yield note


def _group(sysfs: Sysfs, device: PciDevice) -> IommuGroup | None:
    try:
        return None if device.group is None else sysfs.group(device.group)
    except NotAssignable:  # it has just vanished
        return None


def _functions(sysfs: Sysfs, bdf: Bdf) -> Iterator[Bdf]:
    """Only function 0 says in its registers that there are others: so this asks which there are."""
    if sysfs.link(PCI_DEVICES, str(bdf), "physfn") is not None:
        return
    for number in range(8):
        other = replace(bdf, function=number)
        there = sysfs.text(PCI_DEVICES, str(other), "vendor") is not None
        if there and other != bdf and sysfs.link(PCI_DEVICES, str(other), "physfn") is None:
            yield other


def bars(device: PciDevice) -> Iterator[BarInfo]:
    """What ``resource`` in sysfs lists: six BARs, the ROM, six BARs of virtual functions, a bridge's windows last."""
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
