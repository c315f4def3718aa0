"""What there is: devices with their names, their state, and whether they can be assigned."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from kvmpass.errors import HostNotReady, NoSuchDevice, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.blocker import Blocker
from kvmpass.host.blockers import blockers
from kvmpass.host.doctor import check_host
from kvmpass.host.drivers.restore import orphaned
from kvmpass.host.look import Look
from kvmpass.host.names import Names
from kvmpass.host.sysfs import PCI_DEVICES, IommuGroup, PciDevice, Sysfs
from kvmpass.host.view.filters import select


@dataclass(frozen=True, slots=True)
class Link:
    """A PCI Express link: GT/s and lanes, now and at best; None where the kernel does not know."""

    speed: float | None
    width: int | None
    max_speed: float | None
    max_width: int | None


@dataclass(frozen=True, slots=True)
class Sriov:
    """A virtual function has ``physical``; a physical one has ``enabled`` of ``total`` virtual functions."""

    physical: Bdf | None
    virtual: tuple[Bdf, ...]
    enabled: int
    total: int


@dataclass(frozen=True, slots=True)
class HostStatus:
    """Whether this host can assign devices at all, and this user; ``cause`` and ``remedy`` where not."""

    ready: bool
    permitted: bool
    cause: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device at one moment; nothing in ``blockers`` means that it can be assigned, as far as it goes itself."""

    device: PciDevice
    name: str
    short_name: str
    blockers: tuple[Blocker, ...]
    link: Link | None
    sriov: Sriov | None


@dataclass(frozen=True, slots=True)
class Inventory:
    """``devices`` by address; ``groups`` those of these devices, by number. ``complete``: all processes were seen.

    ``orphaned``: what killed processes have left (of all devices of this machine), for ``kvmpass restore``.
    """

    host: HostStatus
    devices: tuple[DeviceStatus, ...]
    groups: tuple[IommuGroup, ...]
    complete: bool
    orphaned: tuple[Bdf, ...] = ()


def inventory(sysfs: Sysfs, filters: Iterable[str] = ()) -> Inventory:
    """All devices, or those that ``filters`` select. Only reads. Raises what :func:`select` raises."""
    names = Names(sysfs)
    selected = select(sysfs, filters, names)
    look = Look(sysfs, names)
    look.know(selected)
    devices: list[DeviceStatus] = []
    groups: dict[int, IommuGroup] = {}
    for device in selected:
        try:
            number = device.group
            if number is not None and number not in groups:
                groups[number] = look.group(number)
            devices.append(device_status(look, device))
        except (NoSuchDevice, NotAssignable):
            if device.bdf in {one.bdf for one in sysfs.devices()}:
                raise
            # unplugged while we looked
    return Inventory(
        host=host_status(sysfs),
        devices=tuple(devices),
        groups=tuple(groups[number] for number in sorted(groups)),
        complete=sysfs.ask("privileged", lambda: os.geteuid() == 0),
        orphaned=() if sysfs.recorded else tuple(orphaned(sysfs)),
    )


def device_status(look: Look, device: PciDevice) -> DeviceStatus:
    return DeviceStatus(
        device=device,
        name=look.names.of(device),
        short_name=look.names.short(device),
        blockers=tuple(blockers(look.sysfs, device, look=look)),
        link=link_of(look.sysfs, device.bdf),
        sriov=sriov_of(look.sysfs, device.bdf),
    )


def host_status(sysfs: Sysfs) -> HostStatus:
    """What :func:`check_host` says, as a value."""
    try:
        check_host(sysfs)
    except HostNotReady as error:
        return HostStatus(False, True, str(error), _remedy(error))
    except PermissionError as error:
        return HostStatus(True, False, f"{error.filename}: {error.strerror}", _remedy(error))
    return HostStatus(True, True)


def _remedy(error: Exception) -> str | None:
    notes: list[str] = getattr(error, "__notes__", [])
    return notes[0] if notes else None


def link_of(sysfs: Sysfs, bdf: Bdf) -> Link | None:
    """None for a function without a link: conventional PCI, or integrated into the root complex."""

    def file(name: str) -> str:
        return sysfs.text(PCI_DEVICES, str(bdf), name) or ""

    speed, best = _leading(file("current_link_speed")), _leading(file("max_link_speed"))
    width, widest = _leading(file("current_link_width")), _leading(file("max_link_width"))
    if not (best or widest):
        return None
    return Link(speed, int(width) if width else None, best, int(widest) if widest else None)


def _leading(text: str) -> float | None:
    """The number in ``8.0 GT/s PCIe``; None for ``Unknown``, and for 0 and 255, which stand for it.

    drivers/pci/pci-sysfs.c; a width of 255 is PCIE_LNK_WIDTH_UNKNOWN.
    """
    try:
        number = float(text.split()[0])
    except (ValueError, IndexError):
        return None
    return number if 0 < number < 255 else None


def sriov_of(sysfs: Sysfs, bdf: Bdf) -> Sriov | None:
    """None for a function that neither is nor can have a virtual one."""
    base = (PCI_DEVICES, str(bdf))
    physical, total = sysfs.link(*base, "physfn"), sysfs.number(*base, "sriov_totalvfs") or 0
    if physical is None and not total:
        return None
    links = [name for name in sysfs.names(*base) if name.removeprefix("virtfn").isdecimal()]
    targets = [target for name in links if (target := sysfs.link(*base, name))]
    return Sriov(
        physical=Bdf.parse(physical) if physical else None,
        virtual=tuple(sorted(map(Bdf.parse, targets))),
        enabled=sysfs.number(*base, "sriov_numvfs") or 0,
        total=total,
    )
