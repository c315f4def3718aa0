"""A function's BARs and its expansion ROM: their registers, and which of them decode."""

from __future__ import annotations

from collections.abc import Iterator

from kvmpass import pciregs
from kvmpass._teardown import run_all
from kvmpass.pci.bar import Bar
from kvmpass.pci.barspace import BarKind
from kvmpass.pci.configspace import ConfigSpace

_END = pciregs.BAR0 + 4 * pciregs.BARS


class Bars:
    """The BARs of a function, with their registers in ``space``; absent ones read as zeroes.

    Synchronization: with the bus lock held.
    """

    def __init__(self, space: ConfigSpace) -> None:
        self._space = space
        self._registers: dict[int, tuple[Bar, bool]] = {}  # the BAR; whether it is its upper half
        self.decoding = 0
        """The decoding bits of the command register that are in effect."""
        space.emulate(pciregs.BAR0, bytes(_END - pciregs.BAR0))
        space.emulate(pciregs.ROM, bytes(4))

    def __iter__(self) -> Iterator[Bar]:
        return (bar for bar, high in self._registers.values() if not high)

    def add(self, at: int, bar: Bar) -> None:
        """Add ``bar`` with its register at ``at``: in the order of the registers, the ROM last."""
        self._registers[at] = bar, False
        if bar.kind is BarKind.MEMORY64 and at + 4 < _END:
            self._registers[at + 4] = bar, True
        self._show()

    def _show(self) -> None:
        for at, (bar, high) in self._registers.items():
            self._space.set(at, bar.register(high), 4)

    def write(self, offset: int, data: bytes) -> bool:
        """Handle a write inside a dword of configuration space. Return whether it was a BAR's register.

        Raises as ``decode`` does.
        """
        bar, high = self._registers.get(offset & ~3, (None, False))
        if bar is None:
            return False
        register = bytearray(bar.register(high).to_bytes(4, "little"))
        register[offset & 3 : (offset & 3) + len(data)] = data
        bar.set_register(int.from_bytes(register, "little"), high)
        self._decode(bar, self.decoding)  # the ROM's register has an enable bit
        self._show()
        return True

    def decode(self, command: int) -> None:
        """Decode what these bits of the command register enable.

        Raises ``OSError`` where KVM keeps a memslot; then all BARs decode as before.
        """
        try:
            self._apply(self.decoding & command)
        except OSError:
            self._apply(self.decoding)  # only turning off can fail: turn the others on again
            raise
        self._apply(command)
        self.decoding = command & pciregs.COMMAND_DECODING

    def _apply(self, command: int) -> None:
        for bar in self:
            self._decode(bar, command)

    @staticmethod
    def _decode(bar: Bar, command: int) -> None:
        bit = pciregs.COMMAND_IO if bar.kind is BarKind.IO else pciregs.COMMAND_MEMORY
        bar.decode(bool(command & bit))

    def close(self) -> None:
        """Close every BAR. Runs every step even if one fails; idempotent. Raises as ``Bar.close`` does."""
        run_all(*(bar.close for bar in self))
