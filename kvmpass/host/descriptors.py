"""What a descriptor is that another process has opened: an interface to the IOMMU, a VFIO device or a VFIO group.

Its device number says so (``st_rdev``), by which sysfs has a link to its device: who passes it need not be believed.
"""

from __future__ import annotations

import enum
import os
import stat

from kvmpass._dataclass import dataclass
from kvmpass.errors import BadDescriptor, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PCI_DEVICES, VFIO_PCI, PciDevice, Sysfs

_NUMBERS = "sys/dev/char"
_UNTRANSLATED = "noiommu-"  # begins the names of devices and groups without an IOMMU


class Kind(enum.Enum):
    """What is open."""

    IOMMUFD = "/dev/iommu"
    """A context of iommufd."""
    CONTAINER = "/dev/vfio/vfio"
    """A container of VFIO."""
    DEVICE = "a VFIO character device (/dev/vfio/devices/vfioN)"
    """A device by its own node."""
    GROUP = "a VFIO group (/dev/vfio/GROUP)"
    """An IOMMU group by its node."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An open file, by its device number."""

    fd: int
    """The descriptor."""
    kind: Kind
    """What it is."""
    bdf: Bdf | None = None
    """Of a ``DEVICE``: its PCI function."""
    group: int | None = None
    """Of a ``GROUP``: the number of its IOMMU group."""

    def __str__(self) -> str:
        return f"descriptor {self.fd} is {self.kind.value}"


def identify(sysfs: Sysfs, fd: int) -> Descriptor:
    """Return what is open. Raises ``BadDescriptor``; ``NotAssignable`` for a device or group without an IOMMU."""
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError):
        raise BadDescriptor(
            f"descriptor {fd} is not open", "let the process that starts this one pass it on: pass_fds, no O_CLOEXEC"
        ) from None
    link = None
    if stat.S_ISCHR(status.st_mode):
        link = _device_of(sysfs, status.st_rdev)
    found = _kind(fd, link) if link else None
    if found is None:
        raise BadDescriptor(
            f"descriptor {fd} is {_what(status, link)}, not a node of VFIO or iommufd",
            "open /dev/iommu and /dev/vfio/devices/vfioN (iommufd), or /dev/vfio/vfio and /dev/vfio/GROUP (type 1)",
        )
    return found


def _device_of(sysfs: Sysfs, number: int) -> str | None:
    """Return the path of the device with a number, the end of which says what it is; None without one."""
    try:
        return str(sysfs.path(_NUMBERS, f"{os.major(number)}:{os.minor(number)}").readlink())
    except OSError:
        return None


def _kind(fd: int, link: str) -> Descriptor | None:
    """``link`` ends with ``virtual/misc/iommu``, or with ``pci0000:00/0000:00:04.0/vfio-dev/vfio0``."""
    parent, kind, name = ["", "", *link.split("/")][-3:]
    if name.startswith(_UNTRANSLATED):
        raise NotAssignable(
            f"descriptor {fd} is {name} of VFIO, which has no IOMMU: its DMA would not be translated",
            "disable enable_unsafe_noiommu_mode of vfio and turn on the IOMMU (AMD-Vi)",
        )
    if kind == "misc" and name in ("iommu", "vfio"):
        return Descriptor(fd, Kind.IOMMUFD if name == "iommu" else Kind.CONTAINER)
    if kind == "vfio" and name.isdecimal():
        return Descriptor(fd, Kind.GROUP, group=int(name))
    if kind == "vfio-dev":
        return Descriptor(fd, Kind.DEVICE, bdf=Bdf.parse(parent))
    return None


def _what(status: os.stat_result, link: str | None) -> str:
    if link:
        return link.rpartition("/")[2]
    if stat.S_ISCHR(status.st_mode):
        return "a character device that this host does not have now"
    return "no character device"


def passed_devices(sysfs: Sysfs, descriptor: Descriptor) -> list[PciDevice]:
    """Return the devices that can be opened by a ``DEVICE`` or ``GROUP``: those with a VFIO driver.

    Raises ``BadDescriptor`` for another kind; ``NotAssignable`` without a device, or without an IOMMU.
    """
    if descriptor.bdf is not None:
        found = [sysfs.device(descriptor.bdf)]
    elif descriptor.group is not None:
        found = [sysfs.device(bdf) for bdf in sysfs.group(descriptor.group).devices if _has_vfio_driver(sysfs, bdf)]
    else:
        raise BadDescriptor(
            f"{descriptor}, not a device's or a group's", "pass it as the descriptor of the IOMMU (--iommu-fd)"
        )
    if not found:
        raise NotAssignable(
            f"descriptor {descriptor.fd} is of IOMMU group {descriptor.group}, without a device on vfio-pci",
            "bind a device of the group to vfio-pci",
        )
    for device in found:
        if device.group is None or sysfs.group(device.group).no_iommu:
            raise NotAssignable(
                f"descriptor {descriptor.fd} is of {device.bdf}, which has no IOMMU: its DMA would not be translated",
                "turn on the IOMMU (AMD-Vi)",
            )
    return found


def _has_vfio_driver(sysfs: Sysfs, bdf: Bdf) -> bool:
    """Return whether vfio-pci is bound, or a driver on its core for one kind of device."""
    return sysfs.driver(bdf) == VFIO_PCI or bool(sysfs.names(PCI_DEVICES, str(bdf), "vfio-dev"))
