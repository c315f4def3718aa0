"""MSI-X of an assigned function: the table that the guest sees, and its vectors (PCI Local Bus 3.0, 6.8.2).

The device's own table belongs to the host (VFIO programs it, through the interrupt remapping tables); the guest's is
here. A vector costs nothing until the guest unmasks it; a masked one keeps its eventfd, which remembers what the
device raised until then.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress

from kvmpass.kvm import IrqRoutes, Vm
from kvmpass.pci.vector import MessageVector, is_message
from kvmpass.vfio import Device
from kvmpass.vfio.device import MSIX

log = logging.getLogger(__name__)

ENTRY_SIZE = 16
CONTROL_ENABLE = 1 << 15
CONTROL_MASK_ALL = 1 << 14
_RESET_ENTRY = b"\0" * 12 + b"\1\0\0\0"
_VECTOR_MASKED = 1


class Msix:
    """The function's vectors. Calls come one at a time and never raise for what a guest writes."""

    def __init__(self, vm: Vm, routes: IrqRoutes, device: Device, vectors: int) -> None:
        self._device = device
        self._table = bytearray(_RESET_ENTRY * vectors)
        self._vectors = [MessageVector(vm, routes) for _ in range(vectors)]
        self._signalled: set[int] = set()  # what VFIO signals
        self._resizable = device.irqs[MSIX].resizable
        self._enabled = False
        self._mask_all = False
        self.pending = PendingBits(self._vectors)

    @property
    def table_size(self) -> int:
        """Bytes."""
        return len(self._table)

    def read(self, offset: int, size: int) -> bytes:
        """Of the table. ``offset + size`` is inside it."""
        return bytes(self._table[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """To the table; only aligned dwords and quadwords are defined, others are dropped."""
        if len(data) not in (4, 8) or offset % len(data):
            return
        self._table[offset : offset + len(data)] = data
        if offset % ENTRY_SIZE + len(data) == ENTRY_SIZE:  # the upper 31 bits of vector control are reserved
            number = offset // ENTRY_SIZE
            control = number * ENTRY_SIZE + 12
            self._table[control : control + 4] = bytes([self._table[control] & _VECTOR_MASKED, 0, 0, 0])
        self._update(offset // ENTRY_SIZE)

    def set_control(self, value: int) -> None:
        """The guest wrote the capability's message control."""
        self._mask_all = bool(value & CONTROL_MASK_ALL)
        enable = bool(value & CONTROL_ENABLE)
        if enable and not self._enabled:
            self._enabled = True
            self._signal(0)  # turns MSI-X on in the device
        elif self._enabled and not enable:
            try:
                self.disable()
            except OSError as error:
                log.warning("%s MSI-X: %s", self._device.name, error)
        if self._enabled:
            for number in range(len(self._vectors)):
                self._update(number)

    def disable(self) -> None:
        """Routes and irqfds down, then the device's MSI-X off. Every step is tried; raises ``OSError``."""
        self._enabled = False
        used = [vector for vector in self._vectors if vector.open]
        signalled, self._signalled = self._signalled, set()
        with ExitStack() as steps:
            for vector in used:
                steps.callback(vector.close)
            if signalled:
                steps.callback(self._device.disable_irqs, MSIX)
            for vector in used:
                steps.callback(vector.disconnect)

    # --- one vector

    def _update(self, number: int) -> None:
        vector = self._vectors[number]
        at = number * ENTRY_SIZE
        masked = self._table[at + 12] & _VECTOR_MASKED
        try:
            if not self._enabled or self._mask_all or masked:
                vector.disconnect()
                return
            address = int.from_bytes(self._table[at : at + 8], "little")
            data = int.from_bytes(self._table[at + 8 : at + 12], "little")
            if not is_message(address):
                log.debug("%s MSI-X vector %d: no message address: %#x", self._device.name, number, address)
                vector.disconnect()
            elif self._signal(number):
                vector.connect(address, data)
        except OSError as error:
            log.warning("%s MSI-X vector %d: %s", self._device.name, number, error)

    def _signal(self, number: int) -> bool:
        """Let VFIO signal the vector's eventfd. Kernels before 6.5 take new vectors only all at once."""
        if number in self._signalled:
            return True
        vector, on = self._vectors[number], bool(self._signalled)
        try:
            if self._resizable and on:
                self._device.set_irqs(MSIX, number, [vector.eventfd])
            else:
                self._signal_all(self._signalled | {number}, restart=on)
            self._signalled.add(number)
            return True
        except OSError as error:
            log.warning("%s MSI-X vector %d: %s", self._device.name, number, error)
            vector.close()
            if on and not self._resizable:
                with suppress(OSError):
                    self._signal_all(self._signalled, restart=True)  # the others, as before
            return False

    def _signal_all(self, numbers: set[int], *, restart: bool) -> None:
        """Vectors that nobody asked for yet get no eventfd (-1)."""
        eventfds = [self._vectors[n].eventfd if n in numbers else -1 for n in range(max(numbers) + 1)]
        if restart:
            self._device.disable_irqs(MSIX)
        self._device.set_irqs(MSIX, 0, eventfds)


class PendingBits:
    """The pending bit array: one bit for each vector, read-only."""

    def __init__(self, vectors: list[MessageVector]) -> None:
        self._vectors = vectors

    @property
    def size(self) -> int:
        """Bytes: whole quadwords."""
        return -(-len(self._vectors) // 64) * 8

    def read(self, offset: int, size: int) -> bytes:
        vectors = self._vectors[offset * 8 : (offset + size) * 8]
        return sum(vector.pending << bit for bit, vector in enumerate(vectors)).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        pass
