"""An assigned device, seen from Python, and what the host says about it while it is assigned."""

from __future__ import annotations

import enum
import threading

from kvmpass._signals import deferred
from kvmpass.events import DeviceReset
from kvmpass.host import PciDevice, Sysfs
from kvmpass.host.kernel.interrupts import interrupt_counts
from kvmpass.pci import AssignedFunction
from kvmpass.pciregs import COMMAND, COMMAND_DECODING, COMMAND_MASTER
from kvmpass.vfio import Device, Region


class DeviceState(enum.Enum):
    ASSIGNED = "assigned"
    RELEASED = "released"


class AssignedDevice:
    """A device in a machine's domain. Made by ``Machine.assign``; gone after ``Machine.deassign``.

    Synchronization: its registers from any thread (the bus lock); its place and state belong to the machine.

    Its registers are usable from Python: ``regions[0].read_int(0)``. Turn decoding and DMA on first: ``enable()``.
    ``slot`` and ``number`` are its place on the guest's PCI bus 0; ``reset_methods`` how the kernel resets it, in the
    order in which it tries.
    """

    def __init__(self, found: PciDevice, device: Device, lock: threading.RLock) -> None:
        self.bdf = found.bdf
        self.group = found.group
        self.vfio = device
        self.reset_methods = found.reset_methods
        self._lock = lock  # the buses'
        self.slot = 0
        self.number = 0
        self.state = DeviceState.ASSIGNED
        self.function: AssignedFunction | None = None  # what the guest sees of it now
        self.failed = False  # an uncorrected error since the last reset
        self.ejected = threading.Event()  # set when the guest has let go of it
        self.requested = False  # the host wants it back, and the guest was asked

    @property
    def regions(self) -> dict[int, Region]:
        """By VFIO index: 0 to 5 the BARs, 6 the ROM, 7 configuration space; absent ones are absent."""
        return self.vfio.regions

    @property
    def config(self) -> Region:
        return self.vfio.config

    @property
    def interrupt(self) -> str:
        """What the guest uses now: ``MSI-X``, ``MSI``, ``INTx`` or ``none``."""
        return self.function.interrupt if self.function else "none"

    def interrupt_counts(self) -> dict[int | str, int]:
        """The host's count of what the device raised: by MSI or MSI-X vector (from 0), or of ``"INTx"``.

        Only what is set up now: a vector counts from when the guest set it up, and is absent before. VFIO signals KVM
        inside the kernel, so that these are the lines of ``/proc/interrupts``, and have their limits:

        - What comes while the guest masks a vector, or before it took the last one, counts each time; it handles one.
        - INTx is the host's line: its count is that of all devices on it, maybe from before.
        - Where AVIC delivers an interrupt past the host (``avic=1`` of ``kvm_amd``), the host does not count it.
        """
        return interrupt_counts(Sysfs(), self.bdf)

    def enable(self, *, memory: bool = True, bus_master: bool = True) -> None:
        """Let the device decode its BARs, and do DMA. In a guest its driver does this; a guest sees it, too."""
        command = self.config.read_int(COMMAND, 2)
        for bits, wanted in ((COMMAND_DECODING, memory), (COMMAND_MASTER, bus_master)):
            command = command | bits if wanted else command & ~bits
        self._set_command(command)

    def quiesce(self) -> None:
        """No DMA, no decoding: the command register as after power on, whatever anyone left in it."""
        self._set_command(0)

    def _set_command(self, command: int) -> None:
        data = command.to_bytes(2, "little")
        with deferred(), self._lock:
            if self.function is not None:
                self.function.config_write(COMMAND, data)
            else:
                self.config.write(COMMAND, data)

    def reset_event(self, seconds: float, reason: str, method: str | None = None) -> DeviceReset:
        """VFIO does not say which method it took: the kernel takes the first of the device's list that works."""
        if method is None:
            method = next(iter(self.reset_methods), "unknown")
        return DeviceReset(str(self.bdf), method, seconds, reason)

    def __repr__(self) -> str:
        return f"<AssignedDevice {self.bdf} {self.state.value}>"
