"""Events of a machine's devices, for ``Machine(on_event=…)`` and the log."""

from __future__ import annotations

from kvmpass._dataclass import dataclass


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """An event of a device. ``str()`` describes it in one line."""

    bdf: str
    """The device's PCI address on the host; of a device that a daemon serves its name."""


@dataclass(frozen=True, slots=True)
class DeviceError(DeviceEvent):
    """The host has reported an uncorrected error of the device (PCI Express AER; VFIO's ERR interrupt)."""

    def __str__(self) -> str:
        return f"{self.bdf}: the host reports an uncorrected error"


@dataclass(frozen=True, slots=True)
class DeviceRequest(DeviceEvent):
    """The host requests the release of the device, as it is being unbound (VFIO's REQ interrupt)."""

    def __str__(self) -> str:
        return f"{self.bdf}: the host requests its release"


@dataclass(frozen=True, slots=True)
class DeviceFault(DeviceEvent):
    """The IOMMU blocked an access of the device."""

    address: int
    """I/O virtual address; of an interrupt the message's address."""
    access: str
    """``read``, ``write``, ``interrupt`` or ``translation request`` (of a device that has an ATC)."""

    def __str__(self) -> str:
        what = {"read": "a read of", "write": "a write to", "interrupt": "an interrupt sent to"}
        return f"{self.bdf}: the IOMMU blocked {what.get(self.access, f'a {self.access} for')} {self.address:#x}"


@dataclass(frozen=True, slots=True)
class DeviceIommuError(DeviceEvent):
    """The IOMMU has reported another event of the device (AMD IOMMU specification, 2.5)."""

    kind: str
    """The kernel's name: ``INVALID_DEVICE_REQUEST``, ``ILLEGAL_DEV_TABLE_ENTRY``, ``IOTLB_INV_TIMEOUT`` …"""
    text: str
    """The kernel's message."""

    def __str__(self) -> str:
        return f"{self.bdf}: the IOMMU reports {self.kind} ({self.text})"


@dataclass(frozen=True, slots=True)
class DeviceReset(DeviceEvent):
    """The device was reset."""

    method: str
    """The kernel's name: ``flr``, ``pm``, ``bus`` …"""
    seconds: float
    """How long it took."""
    reason: str
    """``assign``, ``deassign``, ``guest reset`` or ``request``."""

    def __str__(self) -> str:
        return f"{self.bdf}: reset ({self.method}) at {self.reason}, {self.seconds * 1000:.0f} ms"


@dataclass(frozen=True, slots=True)
class DeviceReleased(DeviceEvent):
    """The device was removed from a running machine."""

    by: str
    """``guest``: it ejected the device; ``host``: it was removed without an eject."""

    def __str__(self) -> str:
        how = "ejected by the guest" if self.by == "guest" else "removed from the running guest"
        return f"{self.bdf}: {how}"


@dataclass(frozen=True, slots=True)
class DaemonEnded(DeviceEvent):
    """The daemon that serves a virtio device has ended, or the connection to it was closed: the device is gone."""

    reason: str
    """Why."""

    def __str__(self) -> str:
        return f"{self.bdf}: {self.reason}"


@dataclass(frozen=True, slots=True)
class DeviceEventsDropped(DeviceEvent):
    """Events were dropped, as the device or the kernel repeated them too often."""

    kind: str
    """The class of the dropped events."""
    count: int
    """How many were dropped."""

    def __str__(self) -> str:
        return f"{self.bdf}: {self.count} more events of the kind {self.kind} were dropped"
