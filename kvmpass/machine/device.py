"""An assigned device: its registers, its slot on the guest's bus, and its state."""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpass._dataclass import dataclass
from kvmpass._signals import deferred
from kvmpass.errors import NotAssignable
from kvmpass.events import DeviceReset
from kvmpass.host import Bdf, Sysfs
from kvmpass.host.kernel.interrupts import interrupt_counts
from kvmpass.host.sysfs import PCI_DEVICES, VFIO_PCI
from kvmpass.pci import AssignedFunction
from kvmpass.pciregs import COMMAND, COMMAND_DECODING, COMMAND_MASTER
from kvmpass.vfio import Device, Region


class DeviceState(enum.Enum):
    """Whether a device is in its machine's domain."""

    ASSIGNED = "assigned"
    """It is open, and in the domain."""
    RELEASED = "released"
    """It has left the guest; its registers are unusable."""


@dataclass(frozen=True, slots=True)
class BoundDevice:
    """What an assignment needs of a device that is bound to vfio-pci."""

    bdf: Bdf
    """Its address."""
    group: int
    """The number of its IOMMU group."""
    reset_methods: tuple[str, ...]
    """As of ``PciDevice``."""


def find_bound(sysfs: Sysfs, bdf: Bdf) -> BoundDevice:
    """Return a device that is bound to vfio-pci. Raises ``NoSuchDevice``, ``NotAssignable``.

    ``Sysfs.device`` reads a dozen files more, which a further device would wait for.
    """
    group = sysfs.link(PCI_DEVICES, str(bdf), "iommu_group")
    if sysfs.driver(bdf) != VFIO_PCI or group is None or not group.isdecimal():
        found = sysfs.device(bdf)
        if found.driver == VFIO_PCI:
            raise NotAssignable(f"{bdf} has no IOMMU group", f"see why: kvmpass doctor {bdf}")
        raise NotAssignable(
            f"{bdf} is bound to {found.driver or 'no driver'}, not to vfio-pci",
            "use it inside `with kvmpass.host.borrow(bdf):`, or the command kvmpass assign",
        )
    methods = sysfs.text(PCI_DEVICES, str(bdf), "reset_method") or ""
    return BoundDevice(bdf, int(group), tuple(methods.split()))


class AssignedDevice:
    """A device in a machine's domain, from ``Machine.assign`` to ``Machine.deassign``.

    Its registers are usable from Python: ``regions[0].read_int(0)``. Turn decoding and DMA on first: ``enable()``.

    Synchronization: its registers from any thread (the bus lock); slot and state are the machine's (its device lock).
    """

    def __init__(self, found: BoundDevice, device: Device, lock: threading.RLock) -> None:
        self.bdf = found.bdf
        """Its address on the host."""
        self.group = found.group
        """Its IOMMU group's number."""
        self.vfio = device
        """The open VFIO device."""
        self.reset_methods = found.reset_methods
        """How the kernel resets it, in the order in which it tries (``reset_method`` in sysfs)."""
        self._bus_lock = lock
        self.slot = 0
        """Its device number on the guest's bus 0, from 1."""
        self.number = 0
        """Its function number in that slot, 0 to 7."""
        self.state = DeviceState.ASSIGNED
        """Whether it is in the machine's domain."""
        self.function: AssignedFunction | None = None
        """What the guest sees of it; None while it is unplugged."""
        self.failed = False
        """Whether the host has reported an uncorrected error since the last reset."""
        self.ejected = threading.Event()
        """Set when the guest has ejected it."""
        self.requested = False
        """Whether the host has requested its release, and the guest was asked to eject it."""

    @property
    def regions(self) -> dict[int, Region]:
        """The regions that the device has, by VFIO index: 0 to 5 the BARs, 6 the ROM, 7 configuration space."""
        return self.vfio.regions

    @property
    def config(self) -> Region:
        """Configuration space."""
        return self.vfio.config

    @property
    def interrupt(self) -> str:
        """The kind that the guest has enabled: ``MSI-X``, ``MSI``, ``INTx`` or ``none``."""
        return self.function.interrupt if self.function else "none"

    def interrupt_counts(self) -> dict[int | str, int]:
        """Return the host's interrupt counts, by MSI or MSI-X vector (from 0), or of ``"INTx"``.

        A vector is counted from when the guest enabled it, and absent before. VFIO signals KVM inside the kernel:
        these are the lines of ``/proc/interrupts``, with their limits:

        - Interrupts of a vector that the guest masks, or has not acknowledged, are counted; the guest handles one.
        - INTx is the host's line: its count is that of all devices on it, and may include earlier interrupts.
        - The host does not count interrupts that AVIC delivers without it (``avic=1`` of ``kvm_amd``).
        """
        return interrupt_counts(Sysfs(), self.bdf)

    def enable(self, *, memory: bool = True, bus_master: bool = True) -> None:
        """Set or clear memory and I/O decoding, and bus mastering (DMA). A running guest sees the change."""
        command = self.config.read_int(COMMAND, 2)
        for bits, wanted in ((COMMAND_DECODING, memory), (COMMAND_MASTER, bus_master)):
            command = command | bits if wanted else command & ~bits
        self._set_command(command)

    def quiesce(self) -> None:
        """Turn DMA and decoding off: clear the command register, as after power-on."""
        self._set_command(0)

    def _set_command(self, command: int) -> None:
        data = command.to_bytes(2, "little")
        with deferred(), self._bus_lock:
            if self.function is not None:
                self.function.config_write(COMMAND, data)
            else:
                self.config.write(COMMAND, data)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Remove its BARs from the guest, and from the reach of other devices, while the host resets it.

        Raises ``OSError`` if they cannot be removed; then nothing has changed.
        """
        with self._bus_lock:
            function = self.function
            if function is not None:
                function.suspend()
        try:
            yield
        finally:
            with self._bus_lock:
                if function is not None and self.function is function:  # the guest has not ejected it meanwhile
                    function.resume()

    def reset_event(self, seconds: float, reason: str, method: str | None = None) -> DeviceReset:
        """Return the event of a reset that took ``seconds``.

        ``method``: by default the first of ``reset_methods``, as VFIO does not report which method the kernel used.
        """
        if method is None:
            method = next(iter(self.reset_methods), "unknown")
        return DeviceReset(str(self.bdf), method, seconds, reason)

    def __repr__(self) -> str:
        return f"<AssignedDevice {self.bdf} {self.state.value}>"
