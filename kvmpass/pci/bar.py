"""A BAR of an assigned function in the guest: memslots over the device's mmap, and traps for the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol, TypeVar

from kvmpass.bus import Bus
from kvmpass.errors import LayoutError
from kvmpass.layout import PAGE, Range
from kvmpass.memory import GuestMemory, HostMapping
from kvmpass.pci.space import BarKind, BarSpace
from kvmpass.vfio import Region

log = logging.getLogger(__name__)

T = TypeVar("T")

_FLAG_IO = 1
_FLAGS_MEMORY64 = 0b100


class Trap(Protocol):
    """A part of a BAR that never reaches the device: the MSI-X table."""

    def read(self, offset: int, size: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


def mappable(areas: tuple[Range, ...], trapped: Range | None) -> list[Range]:
    """Whole pages of ``areas`` without the pages that ``trapped`` touches."""
    cuts: list[Range] = []
    for area in areas:
        start, end = -(-area.start // PAGE) * PAGE, area.end // PAGE * PAGE
        if trapped is None:
            parts = [(start, end)]
        else:
            low, high = trapped.start // PAGE * PAGE, -(-trapped.end // PAGE) * PAGE
            parts = [(start, min(end, low)), (max(start, high), end)]
        cuts += [Range(a, b - a) for a, b in parts if b > a]
    return cuts


class Bar:
    """One BAR: the registers' value, and what is connected to the guest's address space while it decodes.

    ``size`` is a power of two; ``flags`` are the register's low bits. A bus device: accesses that no memslot takes
    come here and go to the device by system call, or to ``trap``.
    """

    def __init__(
        self,
        region: Region,
        flags: int,
        memory: GuestMemory,
        bus: Bus,
        space: BarSpace,
        trap: tuple[Range, Trap] | None = None,
    ) -> None:
        self._region = region
        self._memory = memory
        self._bus = bus
        self._space = space
        self._trap = trap
        self.size = region.size
        self.flags = flags & (0b11 if flags & _FLAG_IO else 0b1111)
        if flags & _FLAG_IO:
            self.kind = BarKind.IO
        else:
            self.kind = BarKind.MEMORY64 if flags & 0b110 == _FLAGS_MEMORY64 else BarKind.MEMORY32
        self._connected: ExitStack | None = None
        self._mappings: list[tuple[Range, HostMapping]] = []
        self._home = space.allocate(self.kind, self.size)
        self.address = self._home.start
        with ExitStack() as undo:
            undo.callback(self.close)
            if self.kind is not BarKind.IO:
                for area in mappable(region.info.mmap_areas, trap[0] if trap else None):
                    self._mappings.append((area, region.mmap(area)))
            undo.pop_all()

    def close(self) -> None:
        """Out of the guest's reach, then unmapped here: a mapping keeps the device busy."""
        with ExitStack() as steps:
            steps.callback(self._space.free, self.kind, self._home)
            mappings, self._mappings = self._mappings, []
            for _, mapping in mappings:
                steps.callback(mapping.close)
            steps.callback(self.disconnect)

    # --- registers

    def register(self, high: bool) -> int:
        """What the guest reads: the address with the flags, or its upper half."""
        return self.address >> 32 if high else self.address & 0xFFFF_FFFF | self.flags

    def set_register(self, value: int, high: bool) -> None:
        """The guest wrote a dword. Address bits below the size do not exist: that is how it is sized."""
        kept = self.address & (0xFFFF_FFFF if high else ~0xFFFF_FFFF)
        address = kept | (value << 32 if high else value)
        self.address = address & ~(max(self.size, 4) - 1)

    # --- decoding

    def connect(self) -> None:
        """Decode at ``address``, if a guest may use it; otherwise the BAR reaches nobody."""
        self.disconnect()
        here = Range(self.address, self.size)
        if not self._space.allows(self.kind, here):
            log.debug("%s at %s: outside the windows, not decoded", self._name, here)
            return
        try:
            with ExitStack() as made:
                self._bus.add(here.start, here.size, self)
                made.callback(self._bus.remove, self)
                for area, mapping in self._mappings:
                    region = self._memory.add_bar(here.start + area.start, area.size, mapping, 0, self._name)
                    made.callback(self._memory.remove, region)
                self._connected = made.pop_all()
        except (LayoutError, OSError) as error:
            log.debug("%s at %s: not decoded: %s", self._name, here, error)

    def disconnect(self) -> None:
        connected, self._connected = self._connected, None
        if connected is not None:
            connected.close()

    @property
    def _name(self) -> str:
        return f"bar{self._region.info.index}"

    # --- what traps

    def read(self, offset: int, size: int) -> bytes:
        if self._trap and self._trap[0].contains(Range(offset, size)):
            return self._trap[1].read(offset - self._trap[0].start, size)
        return guarded(lambda: self._region.read(offset, size), b"\xff" * size)

    def write(self, offset: int, data: bytes) -> None:
        if self._trap and self._trap[0].overlaps(Range(offset, len(data))):
            if self._trap[0].contains(Range(offset, len(data))):
                self._trap[1].write(offset - self._trap[0].start, data)
            return
        guarded(lambda: self._region.write(offset, data), None)


def guarded(access: Callable[[], T], otherwise: T) -> T:
    """An access of the device on the guest's behalf: what VFIO refuses is answered like an empty bus."""
    try:
        return access()
    except OSError as error:
        log.debug("device access refused: %s", error)
        return otherwise
