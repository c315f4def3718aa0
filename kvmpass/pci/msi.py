"""MSI in the guest: the capability that it sees, and its vectors (PCI Local Bus 3.0, 6.8.1).

An assigned device's own address and data belong to the host (VFIO programs them); the guest's are here.
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
    """The capability at ``at`` of ``space``, which is ``own``'s. ``update`` never raises for what a guest writes.

    Synchronization: called with the bus lock held.
    """

    def __init__(
        self, vm: Vm, routes: IrqRoutes, sink: InterruptSink, space: ConfigSpace, at: int, own: MsiRegisters
    ) -> None:
        self._sink = sink
        self._space = space
        self.start = at
        wide, self._maskable = own.address64, own.maskable
        capable = min(own.vectors, max(sink.count, 1), 32).bit_length() - 1
        self._vectors = [MessageVector(vm, routes) for _ in range(1 << capable)]
        self._wide = wide
        self._data_at = at + (12 if wide else 8)
        self._mask_at = at + (16 if wide else 12)
        self._asked = self._signalled = 0  # how many the guest wants, and how many are signalled

        kept = capable << pciregs.MSI_MULTIPLE_CAPABLE_SHIFT
        kept |= pciregs.MSI_64BIT * wide | pciregs.MSI_MASKABLE * self._maskable
        writable = pciregs.MSI_ENABLE | 7 << pciregs.MSI_MULTIPLE_ENABLE_SHIFT
        space.emulate(at + 2, kept.to_bytes(2, "little"), writable.to_bytes(2, "little"))
        space.emulate(at + 4, bytes(4), b"\xfc\xff\xff\xff")
        if wide:
            space.emulate(at + 8, bytes(4), b"\xff" * 4)
        space.emulate(self._data_at, bytes(4), b"\xff\xff\0\0")
        self.end = self._data_at + 4
        if self._maskable:
            masks = (1 << len(self._vectors)) - 1
            space.emulate(self._mask_at, bytes(8), masks.to_bytes(4, "little"))
            self.end = self._mask_at + 8

    @property
    def enabled(self) -> bool:
        """Whether the guest has turned it on."""
        return bool(self._space.get(self.start + 2, 2) & pciregs.MSI_ENABLE)

    def refresh_pending(self) -> None:
        """Before the guest reads the pending bits: which masked vectors the device has raised."""
        if self._maskable:
            bits = sum(vector.pending << number for number, vector in enumerate(self._vectors))
            self._space.set(self._mask_at + 4, bits, 4)

    def update(self) -> None:
        """The guest has written the capability: as many vectors as it asks for, at its message; off, none."""
        control = self._space.get(self.start + 2, 2)
        asked = min(1 << (control >> pciregs.MSI_MULTIPLE_ENABLE_SHIFT & 7), len(self._vectors))
        try:
            if not self.enabled:
                return self.disable()
            if asked != self._asked:
                self.disable()
                self._asked = asked
                self._signal(asked)
            self._connect()
        except OSError as error:
            log.warning("%s MSI: %s", self._sink.name, error)

    def _signal(self, asked: int) -> None:
        """As many as the host has, down to one: the device then raises those that it has been given."""
        wanted = asked
        while not self._signalled:
            try:
                self._sink.set_irqs(0, [vector.eventfd for vector in self._vectors[:wanted]])
                self._signalled = wanted
            except OSError as error:
                if error.errno != errno.ENOSPC or wanted == 1:
                    raise
                wanted //= 2
        if wanted < asked:
            log.warning("%s MSI: the host has %d vectors, the guest wants %d", self._sink.name, wanted, asked)

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
                vector.connect(address, data & ~(self._asked - 1) | number)

    def disable(self) -> None:
        """Irqfds and routes go, then the device's MSI, then the eventfds. Runs every step even if one fails.

        Raises ``OSError``: what failed stays as it is, and ``disable`` can be called again. Idempotent.
        """
        self._asked = 0
        run_all((*(vector.disconnect for vector in self._vectors), self._close_vectors))

    def _close_vectors(self) -> None:
        if self._signalled:
            self._sink.disable_irqs()
            self._signalled = 0
        run_all(vector.close for vector in self._vectors)
