"""MSI in the guest: the emulated capability, and its vectors (PCI Local Bus 3.0, 6.8.1).

VFIO programs an assigned device's own address and data; the guest's are emulated here.
"""

from __future__ import annotations

import errno

from kvmpass import pciregs
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass.layout import Range
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.function import InterruptSink, Wiring
from kvmpass.pci.message import MessageCapability, pending_bits
from kvmpass.pci.vector import is_message
from kvmpass.pciregs import MsiRegisters

log = limited_log(__name__)


class Msi(MessageCapability):
    """The MSI capability at ``at`` of ``space``; ``own`` are the device's registers.

    Synchronization: with the bus lock held.
    """

    KIND = "MSI"
    ENABLE = pciregs.MSI_ENABLE

    def __init__(self, wiring: Wiring, sink: InterruptSink, space: ConfigSpace, at: int, own: MsiRegisters) -> None:
        capable = min(own.vectors, max(sink.count, 1), 32).bit_length() - 1
        super().__init__(wiring, sink, space, at, 1 << capable)
        self._wide, self._maskable = own.address64, own.maskable
        self._data_at = at + (12 if self._wide else 8)
        self._mask_at = at + (16 if self._wide else 12)
        self._requested = 0  # number of vectors

        kept = capable << pciregs.MSI_MULTIPLE_CAPABLE_SHIFT
        kept |= pciregs.MSI_64BIT * self._wide | pciregs.MSI_MASKABLE * self._maskable
        writable = pciregs.MSI_ENABLE | 7 << pciregs.MSI_MULTIPLE_ENABLE_SHIFT
        space.emulate(at + 2, kept.to_bytes(2, "little"), writable.to_bytes(2, "little"))
        space.emulate(at + 4, bytes(4), b"\xfc\xff\xff\xff")
        if self._wide:
            space.emulate(at + 8, bytes(4), b"\xff" * 4)
        space.emulate(self._data_at, bytes(4), b"\xff\xff\0\0")
        self.end = at + own.size
        """Where the capability ends."""
        self.pending = Range(self._mask_at + 4, 4 if self._maskable else 0)
        """The pending bits, which ``refresh_pending`` sets."""
        if self._maskable:
            masks = (1 << len(self._vectors)) - 1
            space.emulate(self._mask_at, bytes(8), masks.to_bytes(4, "little"))

    def refresh_pending(self) -> None:
        """Set the pending bits of the masked vectors that the device has raised, before the guest reads them."""
        if self._maskable:
            self._space.set(self._mask_at + 4, pending_bits(self._vectors), 4)

    def update(self) -> None:
        """Connect the vectors as the guest has written the capability."""
        requested = min(1 << (self._control >> pciregs.MSI_MULTIPLE_ENABLE_SHIFT & 7), len(self._vectors))
        with log_errors(log, "%s MSI: %s", self._sink.name):
            if not self.enabled:
                self.disable()
                return
            if requested != self._requested:
                self.disable()
                self._requested = requested
                self._signal(requested)
            self._connect()

    def _signal(self, requested: int) -> None:
        """Enable as many vectors as the host has, 1 at least: the device then uses these alone."""
        wanted = requested
        while not self._signalled:
            try:
                self._sink.set_irqs(0, [vector.eventfd for vector in self._vectors[:wanted]])
                self._signalled = set(range(wanted))
            except OSError as error:
                if error.errno != errno.ENOSPC or wanted == 1:
                    raise
                wanted //= 2
        if wanted < requested:
            log.warning("%s MSI: the host has %d vectors, the guest wants %d", self._sink.name, wanted, requested)

    def _connect(self) -> None:
        address = self._space.get(self.start + 4, 4)
        if self._wide:
            address |= self._space.get(self.start + 8, 4) << 32
        data = self._space.get(self._data_at, 2)
        masked = self._space.get(self._mask_at, 4) if self._maskable else 0
        for number, vector in enumerate(self._vectors[: len(self._signalled)]):
            if masked >> number & 1 or not is_message(address):
                vector.disconnect()
            else:
                vector.connect(address, data & ~(self._requested - 1) | number)

    def disable(self) -> None:
        """See ``MessageCapability``."""
        self._requested = 0
        super().disable()
