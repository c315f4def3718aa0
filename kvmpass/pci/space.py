"""Guest address space for BARs: what firmware would hand out, and what a guest may choose."""

from __future__ import annotations

import enum
from typing import Protocol

from kvmpass.errors import LayoutError
from kvmpass.layout import IO_WINDOW_BASE, IO_WINDOW_SIZE, PAGE, Layout, Range

IO_WINDOW = Range(IO_WINDOW_BASE, IO_WINDOW_SIZE)


class BarKind(enum.Enum):
    IO = "io"
    MEMORY32 = "32-bit memory"
    MEMORY64 = "64-bit memory"


class Decoder(Protocol):
    """A BAR that wants to decode addresses another one holds."""

    def retry(self) -> None: ...


class BarSpace:
    """The three windows. First fit, naturally aligned; memory BARs never share a page.

    A guest may put one BAR on top of another while it moves them: the first keeps the addresses, the other waits
    until some BAR lets go.
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
        """A free range for a BAR of ``size`` bytes (a power of two). Raises ``LayoutError`` when full."""
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
        self._used.remove((kind, range_))

    def allows(self, kind: BarKind, range_: Range) -> bool:
        """Whether a guest may put a BAR there: wholly inside a window of its kind."""
        if kind is BarKind.IO:
            return IO_WINDOW.contains(range_)
        return any(self._windows[k].contains(range_) for k in (BarKind.MEMORY32, BarKind.MEMORY64))

    def wait(self, decoder: Decoder) -> None:
        """``decoder`` is asked to try again when addresses become free."""
        if decoder not in self._waiting:
            self._waiting.append(decoder)

    def forget(self, decoder: Decoder) -> None:
        """It no longer wants to decode."""
        if decoder in self._waiting:
            self._waiting.remove(decoder)

    def released(self) -> None:
        """Some BAR has let go of its addresses: the first that fits takes them."""
        waiting, self._waiting = self._waiting, []
        for decoder in waiting:
            decoder.retry()
