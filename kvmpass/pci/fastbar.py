"""What of a BAR guests access without Python: registers of the device that are not mapped, and emulated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvmpass.kvm import FastFile, Fastpath, FastRegisters
from kvmpass.layout import Range

_QUADWORD = 8


def parts(
    size: int, traps: Sequence[tuple[Range, FastRegisters | None]], file: FastFile | None
) -> Iterator[tuple[int, FastRegisters | FastFile]]:
    """Yield registers of a BAR of ``size`` bytes, and their offsets: ``traps``, and of ``file`` what is between them.

    Only whole quadwords: the rest is left to Python, and so are traps that overlap, or are not inside the BAR.
    """
    at = 0
    for range_, registers in sorted(traps, key=lambda trap: trap[0]):
        yield from _between(file, at, range_.start)
        apart = not any(range_.overlaps(other) for other, found in traps if found is not registers)
        whole = registers is not None and range_.start % _QUADWORD == registers.size % _QUADWORD == 0
        if registers is not None and whole and apart and range_.size == registers.size and range_.end <= size:
            yield range_.start, registers
        at = max(at, range_.end)
    if file is not None:
        yield from _between(file, at, file.size)


def _between(file: FastFile | None, start: int, end: int) -> Iterator[tuple[int, FastFile]]:
    if file is None:
        return
    start, end = -(-start // _QUADWORD) * _QUADWORD, min(end, file.size) // _QUADWORD * _QUADWORD
    if start < end:
        yield start, file.part(Range(start, end - start))


class FastBar:
    """The registers of a BAR of ``size`` bytes on the fast path. Does nothing without one.

    Synchronization: with the bus lock held.
    """

    def __init__(
        self,
        fastpath: Fastpath | None,
        size: int,
        traps: Sequence[tuple[Range, FastRegisters | None]],
        file: FastFile | None,
    ) -> None:
        self._fastpath = fastpath
        self._parts = [*parts(size, traps, file)]
        self._shown: list[int] = []

    def show(self, address: int, label: Callable[[int], str]) -> None:
        """Add the registers of a BAR at ``address``; ``label`` says what is at an offset."""
        if self._fastpath is not None:
            for offset, registers in self._parts:
                self._shown.append(address + offset)
                self._fastpath.set(address + offset, registers, label(offset))

    def hide(self) -> None:
        """Remove what ``show`` has added. Idempotent."""
        if self._fastpath is not None:
            for at in self._shown:
                self._fastpath.remove(at)
            self._shown.clear()
