"""The inventory: all devices with their names, their state, and whether they can be assigned."""

from __future__ import annotations

import os
from collections.abc import Iterable

from kvmpass._dataclass import dataclass
from kvmpass.errors import NoSuchDevice, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.backend import BackendChoice, cdevs, choose_backend
from kvmpass.host.blocker import Blocker
from kvmpass.host.blockers import blockers
from kvmpass.host.doctor import host_blocker
from kvmpass.host.drivers.restore import orphaned
from kvmpass.host.look import Look
from kvmpass.host.names import Names
from kvmpass.host.sysfs import PCI_DEVICES, IommuGroup, PciDevice, Sysfs
from kvmpass.host.view.filters import select


@dataclass(frozen=True, slots=True)
class Link:
    """A PCI Express link; None for what is unknown."""

    speed_gts: float | None
    """Current speed in GT/s."""
    width: int | None
    """Current width in lanes."""
    max_speed_gts: float | None
    """Maximum speed in GT/s."""
    max_width: int | None
    """Maximum width in lanes."""


@dataclass(frozen=True, slots=True)
class Sriov:
    """A virtual function (VF), or a physical function (PF) with the SR-IOV capability."""

    physical_function: Bdf | None
    """The PF of a VF; None for a PF."""
    virtual_functions: tuple[Bdf, ...]
    """The VFs of a PF, by address."""
    enabled: int
    """Number of enabled VFs."""
    total: int
    """Maximum number of VFs."""


@dataclass(frozen=True, slots=True)
class HostStatus:
    """Whether this host can assign devices."""

    blocker: Blocker | None = None
    """Why this host, or this user, cannot; None if both can."""

    @property
    def ready(self) -> bool:
        """Whether the host can."""
        return self.blocker is None or bool(self.blocker.denied)

    @property
    def permitted(self) -> bool:
        """Whether this user can."""
        return self.blocker is None or not self.blocker.denied


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device at one moment."""

    device: PciDevice
    """The device as the kernel shows it."""
    name: str
    """Vendor and model in full."""
    short_name: str
    """Vendor and model, with the vendor's brand."""
    blockers: tuple[Blocker, ...]
    """Why it cannot be assigned; empty if it can on a host that is ready."""
    link: Link | None
    """Its PCI Express link; None without one."""
    sriov: Sriov | None
    """None without SR-IOV."""
    cdev: str | None
    """Its VFIO character device, such as ``/dev/vfio/devices/vfio0``; None without one."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Devices of a host at one moment."""

    host: HostStatus
    """Whether this host can assign devices."""
    devices: tuple[DeviceStatus, ...]
    """The selected devices, by address."""
    groups: tuple[IommuGroup, ...]
    """The IOMMU groups of these devices, by number."""
    complete: bool
    """Whether this user sees all processes, as root does."""
    backend: BackendChoice
    """The IOMMU back end that a machine would use."""
    orphaned: tuple[Bdf, ...] = ()
    """All devices of this host that killed processes have left for ``kvmpass restore``."""


def inventory(sysfs: Sysfs, filters: Iterable[str] = ()) -> Inventory:
    """List all devices, or those that ``filters`` select. Only reads. Raises what :func:`select` raises."""
    return take_inventory(sysfs, filters, details=True)


def take_inventory(sysfs: Sysfs, filters: Iterable[str], *, details: bool) -> Inventory:
    """Return the inventory for ``kvmpass list``, which shows ``details`` only if asked to.

    Without them ``link``, ``sriov`` and ``cdev`` are None for every device: this reads seven fewer files for each.
    """
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
            devices.append(device_status(look, device, details=details))
        except (NoSuchDevice, NotAssignable):
            if device.bdf in {present.bdf for present in sysfs.devices()}:
                raise
            # unplugged concurrently
    return Inventory(
        host=host_status(sysfs, look),
        devices=tuple(devices),
        groups=tuple(groups[number] for number in sorted(groups)),
        complete=sysfs.ask("privileged", lambda: os.geteuid() == 0),
        backend=choose_backend(sysfs),
        orphaned=() if sysfs.recorded else tuple(orphaned(sysfs)),
    )


def device_status(look: Look, device: PciDevice, *, details: bool = True) -> DeviceStatus:
    """Return a device with its names and blockers. Raises ``NotAssignable`` if its group was removed concurrently.

    ``details``: as for :func:`take_inventory`.
    """
    return DeviceStatus(
        device=device,
        name=look.names.of(device),
        short_name=look.names.short(device),
        blockers=tuple(blockers(look.sysfs, device, look=look)),
        link=link_of(look.sysfs, device.bdf) if details else None,
        sriov=sriov_of(look.sysfs, device.bdf) if details else None,
        cdev=next((f"/{node}" for node in cdevs(look.sysfs, device.bdf)), None) if details else None,
    )


def host_status(sysfs: Sysfs, look: Look | None = None) -> HostStatus:
    """Return whether this host can assign devices; ``look``: the view of it, if there is one. Raises nothing."""
    return HostStatus(host_blocker(sysfs, look=look))


def link_of(sysfs: Sysfs, bdf: Bdf) -> Link | None:
    """Return the link of a function; None for conventional PCI and for root complex integrated endpoints."""

    def file(name: str) -> str:
        return sysfs.text(PCI_DEVICES, str(bdf), name) or ""

    speed, best = _leading(file("current_link_speed")), _leading(file("max_link_speed"))
    width, widest = _leading(file("current_link_width")), _leading(file("max_link_width"))
    if not (best or widest):
        return None
    return Link(speed, int(width) if width else None, best, int(widest) if widest else None)


def _leading(text: str) -> float | None:
    """Return the number in ``8.0 GT/s PCIe``; None for ``Unknown``, and for 0 and 255, which mean unknown.

    drivers/pci/pci-sysfs.c; a width of 255 is PCIE_LNK_WIDTH_UNKNOWN.
    """
    try:
        number = float(text.split()[0])
    except (ValueError, IndexError):
        return None
    return number if 0 < number < 255 else None


def sriov_of(sysfs: Sysfs, bdf: Bdf) -> Sriov | None:
    """Return the SR-IOV state of a function; None for one without SR-IOV."""
    base = (PCI_DEVICES, str(bdf))
    physical, total = sysfs.link(*base, "physfn"), sysfs.number(*base, "sriov_totalvfs") or 0
    if physical is None and not total:
        return None
    return Sriov(
        physical_function=Bdf.parse(physical) if physical else None,
        virtual_functions=tuple(sysfs.virtual_functions(bdf)),
        enabled=sysfs.number(*base, "sriov_numvfs") or 0,
        total=total,
    )
