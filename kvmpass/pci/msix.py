"""MSI-X in the guest: the emulated table, and its vectors (PCI Local Bus 3.0, 6.8.2).

VFIO programs an assigned device's own table, for the host's interrupt remapping; the guest's is emulated here. A
vector uses no resources until the guest unmasks it. When the guest masks it again its eventfd is kept, and counts the
interrupts that the device raises: the pending bit.
"""

from __future__ import annotations

from kvmpass._ratelimit import limited_log, log_errors
from kvmpass.kvm import FastRegisters
from kvmpass.layout import Range
from kvmpass.pci.bar import Bar, Trap
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pci.function import InterruptSink, Wiring
from kvmpass.pci.message import MessageCapability, pending_bits
from kvmpass.pci.vector import MessageVector, is_message
from kvmpass.pciregs import MSIX_ENABLE, MSIX_ENTRY_SIZE, MSIX_MASK_ALL, MsixRegisters

log = limited_log(__name__)

_RESET_ENTRY = b"\0" * 12 + b"\1\0\0\0"
_VECTOR_MASKED = 1


class Msix(MessageCapability):
    """The MSI-X capability at ``at`` of ``space``; ``own`` are the device's registers.

    The function links the capability, and passes ``traps`` to its BARs.

    Synchronization: with the bus lock held.
    """

    KIND = "MSI-X"
    ENABLE = MSIX_ENABLE

    def __init__(self, wiring: Wiring, sink: InterruptSink, space: ConfigSpace, at: int, own: MsixRegisters) -> None:
        super().__init__(wiring, sink, space, at, own.vectors)
        self._own = own
        self.end = at + 12
        """Where the capability ends."""
        self._place = Range(own.table_offset, own.table_size)
        self._bar: Bar | None = None  # that of the table
        self._table = bytearray(_RESET_ENTRY * own.vectors)
        self._resizable = sink.resizable
        self._enabled = False
        self._mask_all = False
        writable = MSIX_ENABLE | MSIX_MASK_ALL
        space.emulate(at + 2, (own.vectors - 1).to_bytes(2, "little"), writable.to_bytes(2, "little"))
        for offset, place in ((4, own.table_offset | own.table_bar), (8, own.pba_offset | own.pba_bar)):
            space.emulate(at + offset, place.to_bytes(4, "little"))

    def traps(self, bar: int) -> list[Trap]:
        """Return the table and the pending bits, if they are in BAR number ``bar``."""
        own = self._own
        registers = FastRegisters(self._table, bytearray(b"\xff") * own.table_size, -1, 0, exits=Range(0, 0))
        table = Trap(self._place, self, "MSI-X table", self._connect_bar, registers)
        pending = Trap(Range(own.pba_offset, own.pba_size), PendingBits(self._vectors), "MSI-X pending bits")
        return [trap for at, trap in ((own.table_bar, table), (own.pba_bar, pending)) if at == bar]

    def _connect_bar(self, bar: Bar) -> None:
        self._bar = bar

    def read(self, offset: int, size: int) -> bytes:
        """Read the table. ``offset + size`` is inside it."""
        return bytes(self._table[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write the table; other accesses than aligned dwords and quadwords are undefined, and dropped."""
        if len(data) not in (4, 8) or offset % len(data):
            return
        self._table[offset : offset + len(data)] = data
        if offset % MSIX_ENTRY_SIZE + len(data) == MSIX_ENTRY_SIZE:
            # The upper 31 bits of vector control are reserved.
            control = offset // MSIX_ENTRY_SIZE * MSIX_ENTRY_SIZE + 12
            self._table[control : control + 4] = bytes([self._table[control] & _VECTOR_MASKED, 0, 0, 0])
        if self._enabled:
            self._update(offset // MSIX_ENTRY_SIZE)

    def update(self) -> None:
        """Connect the vectors as the guest has written message control."""
        self._mask_all = bool(self._control & MSIX_MASK_ALL)
        enable = self.enabled
        # Linux masks every entry, and writes those that it uses, while all are masked (msix_capability_init).
        if self._bar is not None:
            self._bar.collect(self._place, enable and self._mask_all)
        if self._enabled and not enable:
            with log_errors(log, "%s MSI-X: %s", self._sink.name):
                self.disable()
        self._enabled = enable
        if enable:
            numbers = range(len(self._vectors))
            wanted = {number for number in numbers if self._message(number)}
            if not wanted and not self._signalled:
                wanted = {0}  # enables MSI-X in the device
            self._signal(wanted)
            for number in numbers:
                self._connect(number)

    def disable(self) -> None:
        """See ``MessageCapability``."""
        self._enabled = False
        super().disable()

    # --- one vector

    def _message(self, number: int) -> tuple[int, int] | None:
        """Address and data of the vector's message; None while it is masked, or where they are no interrupt."""
        at = number * MSIX_ENTRY_SIZE
        if not self._enabled or self._mask_all or self._table[at + 12] & _VECTOR_MASKED:
            return None
        address = int.from_bytes(self._table[at : at + 8], "little")
        return (address, int.from_bytes(self._table[at + 8 : at + 12], "little")) if is_message(address) else None

    def _update(self, number: int) -> None:
        if self._message(number):
            self._signal({number})
        self._connect(number)

    def _connect(self, number: int) -> None:
        vector, message = self._vectors[number], self._message(number)
        with log_errors(log, "%s MSI-X vector %d: %s", self._sink.name, number):
            if message is None:
                vector.disconnect()
            elif number in self._signalled:
                vector.connect(*message)

    # --- what the sink signals

    def _signal(self, numbers: set[int]) -> None:
        """Let the sink signal these vectors, too. If the host has too few vectors the lowest numbers are signalled.

        A sink that is not resizable (VFIO before Linux 6.5) is disabled and enabled again, once for all new vectors.
        """
        new = sorted(numbers - self._signalled)
        if self._resizable and self._signalled:
            for number in new:
                self._add([number])
        elif new:
            self._add(new)

    def _add(self, new: list[int]) -> bool:
        try:
            self._set(new)
            return True
        except OSError as error:
            if len(new) > 1:
                half = len(new) // 2
                return self._add(new[:half]) and self._add(new[half:])
            log.warning("%s MSI-X vector %d: %s", self._sink.name, new[0], error)
            with log_errors(log, "%s MSI-X vector %d: %s", self._sink.name, new[0]):
                self._vectors[new[0]].close()
            return False

    def _set(self, new: list[int]) -> None:
        """Signal these vectors, too. Raises ``OSError``: the others are signalled as before."""
        if self._resizable and self._signalled:
            self._sink.set_irqs(new[0], [self._vectors[new[0]].eventfd])
        else:
            before = sorted(self._signalled)
            self._stop_signalling()
            try:
                self._set_all([*before, *new])
            except OSError:
                if before:
                    self._set_all(before)
                raise
        self._signalled.update(new)

    def _set_all(self, numbers: list[int]) -> None:
        """Signal exactly these vectors; those in between have no eventfd (-1)."""
        wanted = set(numbers)
        eventfds = [self._vectors[n].eventfd if n in wanted else -1 for n in range(max(numbers) + 1)]
        self._sink.set_irqs(0, eventfds)
        self._signalled = wanted


class PendingBits:
    """The pending bit array: one bit for each vector, read-only.

    Synchronization: with the bus lock held.
    """

    def __init__(self, vectors: list[MessageVector]) -> None:
        self._vectors = vectors

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of pending bits."""
        vectors = self._vectors[offset * 8 : (offset + size) * 8]
        return pending_bits(vectors).to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Drop the write."""
