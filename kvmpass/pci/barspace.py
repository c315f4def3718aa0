"""Guest address space for BARs: the addresses that firmware would assign, and those that a guest may choose."""

from __future__ import annotations

import enum
from typing import Protocol

from kvmpass.errors import LayoutError
from kvmpass.layout import IO_WINDOW_BASE, IO_WINDOW_SIZE, PAGE, Layout, Range

IO_WINDOW = Range(IO_WINDOW_BASE, IO_WINDOW_SIZE)
"""Ports for BARs."""


class BarKind(enum.Enum):
    """What a BAR decodes."""

    IO = "io"
    """I/O ports."""
    MEMORY32 = "32-bit memory"
    """Memory below 4 GiB."""
    MEMORY64 = "64-bit memory"
    """Memory at 64-bit addresses."""


class Decoder(Protocol):
    """A BAR that waits for addresses which another BAR decodes."""

    def retry(self) -> None:
        """Decode, if the addresses are free now."""


class BarSpace:
    """The windows for each kind of BAR. First fit, naturally aligned; memory BARs never share a page.

    A guest may write overlapping addresses while it moves BARs: the first BAR decodes them, the other one waits until
    a BAR stops decoding.

    Synchronization: with the bus lock held.
    """

    def __init__(self, layout: Layout) -> None:
        self._windows = {
            BarKind.IO: IO_WINDOW,
            BarKind.MEMORY32: layout.mmio32,
            BarKind.MEMORY64: layout.mmio64,
        }
        self._used: list[tuple[BarKind, Range]] = []
        self._waiting: list[Decoder] = []

    def allocate(self, kind: BarKind, size: int) -> Range:
        """Allocate addresses for a BAR of ``size`` bytes (a power of two). Raises ``LayoutError`` when full."""
        window = self._windows[kind]
        if kind is not BarKind.IO:
            size = max(size, PAGE)
        at = -(-window.start // size) * size
        for used in sorted(range_ for used_kind, range_ in self._used if used_kind is kind):
            if at + size <= used.start:
                break
            at = max(at, -(-used.end // size) * size)
        if at + size > window.end:
            raise LayoutError(f"no room for a {kind.value} BAR of {size:#x} bytes in {window}")
        range_ = Range(at, size)
        self._used.append((kind, range_))
        return range_

    def free(self, kind: BarKind, range_: Range) -> None:
        """Undo ``allocate``. Raises ``ValueError`` for a range that is not allocated."""
        self._used.remove((kind, range_))

    def allows(self, kind: BarKind, range_: Range) -> bool:
        """Whether a guest may move a BAR there: wholly inside a window of its kind."""
        if kind is BarKind.IO:
            return IO_WINDOW.contains(range_)
        return any(self._windows[k].contains(range_) for k in (BarKind.MEMORY32, BarKind.MEMORY64))

    def wait(self, decoder: Decoder) -> None:
        """Retry ``decoder`` when a BAR stops decoding. Idempotent."""
        if decoder not in self._waiting:
            self._waiting.append(decoder)

    def forget(self, decoder: Decoder) -> None:
        """Undo ``wait``. Idempotent."""
        if decoder in self._waiting:
            self._waiting.remove(decoder)

    def released(self) -> None:
        """Retry the waiting decoders, in their order, after a BAR has stopped decoding."""
        waiting, self._waiting = self._waiting, []
        for decoder in waiting:
            decoder.retry()
