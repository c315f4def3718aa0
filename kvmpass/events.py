"""What happens to a machine's devices while it lives, as values: for ``Machine(on_event=…)`` and the log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something happened to the device at PCI address ``bdf``. ``str()`` says it in a line."""

    bdf: str


@dataclass(frozen=True, slots=True)
class DeviceError(DeviceEvent):
    """The host saw an uncorrected error of the device (PCI Express AER; VFIO's ERR interrupt)."""

    def __str__(self) -> str:
        return f"{self.bdf}: the host reports an uncorrected error"


@dataclass(frozen=True, slots=True)
class DeviceRequest(DeviceEvent):
    """The host wants the device back: somebody unbinds it (VFIO's REQ interrupt)."""

    def __str__(self) -> str:
        return f"{self.bdf}: the host wants it back"


@dataclass(frozen=True, slots=True)
class DeviceFault(DeviceEvent):
    """The IOMMU blocked an access of the device at the I/O virtual address ``address``.

    ``access``: ``read``, ``write``, ``interrupt`` (``address`` is then that of the message) or
    ``translation request`` (of a device with an address translation cache of its own).
    """

    address: int
    access: str

    @property
    def write(self) -> bool:
        """Whether it was a write to memory."""
        return self.access == "write"

    def __str__(self) -> str:
        what = {"read": "a read of", "write": "a write to", "interrupt": "an interrupt sent to"}
        return f"{self.bdf}: the IOMMU blocked {what.get(self.access, f'a {self.access} for')} {self.address:#x}"


@dataclass(frozen=True, slots=True)
class DeviceIommuError(DeviceEvent):
    """The IOMMU has something else to report of the device. ``kind`` is the kernel's word, ``text`` its message.

    ``INVALID_DEVICE_REQUEST``, ``ILLEGAL_DEV_TABLE_ENTRY``, ``IOTLB_INV_TIMEOUT``, ``PAGE_TAB_HARDWARE_ERROR`` …
    (AMD IOMMU specification, 2.5).
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.bdf}: the IOMMU reports {self.kind} ({self.text})"


@dataclass(frozen=True, slots=True)
class DeviceReset(DeviceEvent):
    """The device was reset. ``method``: the kernel's word (``flr``, ``pm``, ``bus`` …), ``reason``: when."""

    method: str
    seconds: float
    reason: str

    def __str__(self) -> str:
        return f"{self.bdf}: reset ({self.method}) at {self.reason}, {self.seconds * 1000:.0f} ms"


@dataclass(frozen=True, slots=True)
class DeviceReleased(DeviceEvent):
    """The device left a running machine. ``by``: ``guest`` (ejected) or ``host`` (removed without an eject)."""

    by: str

    def __str__(self) -> str:
        how = "ejected by the guest" if self.by == "guest" else "removed from the running guest"
        return f"{self.bdf}: {how}"


@dataclass(frozen=True, slots=True)
class DeviceEventsDropped(DeviceEvent):
    """``count`` events of the class ``kind`` were not told: the device, or the kernel, repeated them too often."""

    kind: str
    count: int

    def __str__(self) -> str:
        return f"{self.bdf}: {self.count} more events of the kind {self.kind} were dropped"
