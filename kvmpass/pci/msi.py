"""MSI in the guest: the emulated capability, and its vectors (PCI Local Bus 3.0, 6.8.1).

VFIO programs an assigned device's own address and data; the guest's are emulated here.
"""

from __future__ import annotations

import errno

from kvmpass import pciregs
from kvmpass._ratelimit import limited_log
from kvmpass._teardown import run_all
from kvmpass.kvm import IrqRoutes, Vm
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.function import InterruptSink
from kvmpass.pci.vector import MessageVector, is_message
from kvmpass.pciregs import MsiRegisters

log = limited_log(__name__)


class Msi:
    """The MSI capability at ``at`` of ``space``; ``own`` are the device's registers.

    Nothing but ``disable`` raises, whatever a guest writes.

    Synchronization: with the bus lock held.
    """

    def __init__(
        self, vm: Vm, routes: IrqRoutes, sink: InterruptSink, space: ConfigSpace, at: int, own: MsiRegisters
    ) -> None:
        self._sink = sink
        self._space = space
        self.start = at
        """Where the capability begins."""
        wide, self._maskable = own.address64, own.maskable
        capable = min(own.vectors, max(sink.count, 1), 32).bit_length() - 1
        self._vectors = [MessageVector(vm, routes) for _ in range(1 << capable)]
        self._wide = wide
        self._data_at = at + (12 if wide else 8)
        self._mask_at = at + (16 if wide else 12)
        self._requested = self._signalled = 0  # numbers of vectors: the guest's, the sink's

        kept = capable << pciregs.MSI_MULTIPLE_CAPABLE_SHIFT
        kept |= pciregs.MSI_64BIT * wide | pciregs.MSI_MASKABLE * self._maskable
        writable = pciregs.MSI_ENABLE | 7 << pciregs.MSI_MULTIPLE_ENABLE_SHIFT
        space.emulate(at + 2, kept.to_bytes(2, "little"), writable.to_bytes(2, "little"))
        space.emulate(at + 4, bytes(4), b"\xfc\xff\xff\xff")
        if wide:
            space.emulate(at + 8, bytes(4), b"\xff" * 4)
        space.emulate(self._data_at, bytes(4), b"\xff\xff\0\0")
        self.end = self._data_at + 4
        """Where the capability ends."""
        if self._maskable:
            masks = (1 << len(self._vectors)) - 1
            space.emulate(self._mask_at, bytes(8), masks.to_bytes(4, "little"))
            self.end = self._mask_at + 8

    @property
    def enabled(self) -> bool:
        """Whether the guest has enabled MSI."""
        return bool(self._space.get(self.start + 2, 2) & pciregs.MSI_ENABLE)

    def refresh_pending(self) -> None:
        """Set the pending bits of the masked vectors that the device has raised, before the guest reads them."""
        if self._maskable:
            bits = sum(vector.pending << number for number, vector in enumerate(self._vectors))
            self._space.set(self._mask_at + 4, bits, 4)

    def update(self) -> None:
        """Connect the vectors as the guest has written the capability."""
        control = self._space.get(self.start + 2, 2)
        requested = min(1 << (control >> pciregs.MSI_MULTIPLE_ENABLE_SHIFT & 7), len(self._vectors))
        try:
            if not self.enabled:
                return self.disable()
            if requested != self._requested:
                self.disable()
                self._requested = requested
                self._signal(requested)
            self._connect()
        except OSError as error:
            log.warning("%s MSI: %s", self._sink.name, error)

    def _signal(self, requested: int) -> None:
        """Enable as many vectors as the host has, 1 at least: the device then uses these alone."""
        wanted = requested
        while not self._signalled:
            try:
                self._sink.set_irqs(0, [vector.eventfd for vector in self._vectors[:wanted]])
                self._signalled = wanted
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
        for number, vector in enumerate(self._vectors[: self._signalled]):
            if masked >> number & 1 or not is_message(address):
                vector.disconnect()
            else:
                vector.connect(address, data & ~(self._requested - 1) | number)

    def disable(self) -> None:
        """Remove irqfds and routes, disable the sink, close the eventfds. Runs every step even if one fails.

        Raises ``OSError``: what failed stays as it is, and ``disable`` can be called again. Idempotent.
        """
        self._requested = 0
        run_all((*(vector.disconnect for vector in self._vectors), self._close_vectors))

    def _close_vectors(self) -> None:
        if self._signalled:
            self._sink.disable_irqs()
            self._signalled = 0
        run_all(vector.close for vector in self._vectors)
