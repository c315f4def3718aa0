"""Guest memory: one list of regions, from which KVM memslots and IOMMU mappings are both derived.

A region is RAM, ROM (the device and the guest may read it) or BAR (an assigned device's own memory, which the
guest reaches by a memslot and no device reaches by DMA). Whoever mirrors the list registers a listener.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kvmpass._fd import check
from kvmpass._native import ffi, lib
from kvmpass.errors import Closed, LayoutError
from kvmpass.layout import PAGE, Range

HUGE = 2 << 20  # a large page: CPU and IOMMU tables both have 2 MiB entries (AMD IOMMU specification, 2.2.3)
_POPULATE_CHUNK = 256 << 20


class HostMapping:
    """A mapping in this process whose address is chosen: equal to ``congruent`` modulo ``align``.

    Not inherited over ``fork``. ``close()`` unmaps; nothing may use the address afterwards.
    """

    def __init__(
        self,
        size: int,
        *,
        align: int = PAGE,
        congruent: int = 0,
        fd: int = -1,
        offset: int = 0,
        writable: bool = True,
    ) -> None:
        flags = lib.MAP_SHARED if fd >= 0 else lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE
        protection = lib.PROT_READ | (lib.PROT_WRITE if writable else 0)
        result = lib.kvmpass_mmap(size, align, congruent % align, protection, flags, fd, offset)
        self._address = check(result, "mmap", f"{size:#x} bytes")
        self.size = size
        check(lib.kvmpass_madvise(self._address, self._span, lib.MADV_DONTFORK), "madvise(MADV_DONTFORK)")

    @property
    def _span(self) -> int:
        return -(-self.size // PAGE) * PAGE

    @property
    def address(self) -> int:
        """The host virtual address. Raises ``Closed`` after ``close()``."""
        if not self._address:
            raise Closed("the mapping is closed")
        return self._address

    def advise_huge(self) -> None:
        """Ask for transparent huge pages; a kernel without them ignores it."""
        lib.kvmpass_madvise(self.address, self._span, lib.MADV_HUGEPAGE)

    def populate(self) -> None:
        """Allocate and zero every page now, in parallel (``MADV_POPULATE_WRITE``, without the GIL).

        Raises ``OSError``: ``ENOMEM`` without memory; kernels older than 5.14 (``EINVAL``) fill it on first use.
        """
        address, size = self.address, self._span

        def fill(at: int) -> int:
            chunk = min(_POPULATE_CHUNK, size - at)
            return lib.kvmpass_madvise(address + at, chunk, lib.MADV_POPULATE_WRITE)

        starts = range(0, size, _POPULATE_CHUNK)
        with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
            for result in pool.map(fill, starts):
                if result != -errno.EINVAL:
                    check(result, "madvise(MADV_POPULATE_WRITE)")

    def view(self, offset: int, size: int) -> memoryview:
        """``size`` bytes at ``offset`` as a writable buffer. Raises ``IndexError`` outside the mapping."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise IndexError(f"{offset:#x}+{size:#x} is outside a mapping of {self.size:#x} bytes")
        return memoryview(ffi.buffer(ffi.cast("char *", self.address + offset), size)).cast("B")

    def close(self) -> None:
        address, self._address = self._address, 0
        if address:
            check(lib.kvmpass_munmap(address, self._span), "munmap")


class RegionKind(enum.Enum):
    RAM = "ram"
    ROM = "rom"
    BAR = "bar"


class MemoryRegion:
    """Contiguous guest-physical pages with one backing. Identity matters; compare with ``is``."""

    def __init__(self, kind: RegionKind, range_: Range, mapping: HostMapping, *, offset: int = 0, name: str) -> None:
        self.kind = kind
        self.range = range_
        self.mapping = mapping
        self.offset = offset
        self.name = name

    @property
    def gpa(self) -> int:
        return self.range.start

    @property
    def size(self) -> int:
        return self.range.size

    @property
    def hva(self) -> int:
        return self.mapping.address + self.offset

    @property
    def guest_writable(self) -> bool:
        return self.kind is not RegionKind.ROM

    @property
    def dma(self) -> bool:
        """Whether devices reach it: RAM and ROM, never another device's BAR."""
        return self.kind is not RegionKind.BAR

    @property
    def backing(self) -> str:
        return {RegionKind.BAR: "device"}.get(self.kind, "anonymous")

    def __repr__(self) -> str:
        return f"<{self.name} {self.kind.value} {self.range}>"


class RegionListener(Protocol):
    """Mirrors the list somewhere. ``added`` may refuse by raising; ``removed`` comes before the region goes."""

    def region_added(self, region: MemoryRegion) -> None: ...

    def region_removed(self, region: MemoryRegion) -> None: ...


def _whole_pages(range_: Range, name: str) -> Range:
    if range_.start % PAGE or range_.size % PAGE or range_.size <= 0 or range_.start < 0:
        raise LayoutError(f"{name}: {range_} is not made of whole pages")
    return range_


class GuestMemory:
    """The list. ``read`` and ``write`` reach RAM and ROM by guest-physical address.

    Adding and removing is serialised by a lock; reading and writing are as unsynchronised as any CPU's.
    """

    def __init__(self) -> None:
        self._regions: list[MemoryRegion] = []
        self._listeners: list[RegionListener] = []
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[MemoryRegion]:
        with self._lock:
            return iter(sorted(self._regions, key=lambda region: region.gpa))

    def __len__(self) -> int:
        return len(self._regions)

    def listen(self, listener: RegionListener) -> None:
        """Register ``listener``; it is told of the regions that are there already."""
        with self._lock:
            for region in self:
                listener.region_added(region)
            self._listeners.append(listener)

    # --- changing the list

    def add_ram(self, gpa: int, size: int, name: str = "ram") -> MemoryRegion:
        """``size`` bytes of zeroed anonymous memory, congruent to ``gpa`` modulo 2 MiB."""
        range_ = _whole_pages(Range(gpa, size), name)
        return self._add_owned(RegionKind.RAM, range_, HostMapping(size, align=HUGE, congruent=gpa), name)

    def add_rom(self, gpa: int, data: bytes, name: str = "rom") -> MemoryRegion:
        """Pages that start with ``data``: neither the guest nor a device can change them.

        The size is that of ``data``, rounded up to pages.
        """
        size = -(-len(data) // PAGE) * PAGE
        range_ = _whole_pages(Range(gpa, size), name)
        mapping = HostMapping(size, align=HUGE, congruent=gpa)
        mapping.view(0, len(data))[:] = data
        return self._add_owned(RegionKind.ROM, range_, mapping, name)

    def add_bar(self, gpa: int, size: int, mapping: HostMapping, offset: int, name: str) -> MemoryRegion:
        """Part of a device's BAR. The mapping stays the caller's: remove the region first, then close it."""
        range_ = _whole_pages(Range(gpa, size), name)
        region = MemoryRegion(RegionKind.BAR, range_, mapping, offset=offset, name=name)
        self._add(region)
        return region

    def _add_owned(self, kind: RegionKind, range_: Range, mapping: HostMapping, name: str) -> MemoryRegion:
        try:
            if range_.size >= HUGE:
                mapping.advise_huge()
            region = MemoryRegion(kind, range_, mapping, name=name)
            self._add(region)
        except BaseException:
            mapping.close()
            raise
        return region

    def _add(self, region: MemoryRegion) -> None:
        with self._lock:
            for other in self._regions:
                if other.range.overlaps(region.range):
                    raise LayoutError(f"{region.name} {region.range} overlaps {other.name} {other.range}")
            told: list[RegionListener] = []
            try:
                for listener in self._listeners:
                    listener.region_added(region)
                    told.append(listener)
            except BaseException:
                for listener in reversed(told):
                    listener.region_removed(region)
                raise
            self._regions.append(region)

    def remove(self, region: MemoryRegion) -> None:
        """Take the region out of every mirror, then out of the list; its own memory is released."""
        with self._lock:
            if region not in self._regions:
                raise LayoutError(f"{region.name} {region.range} is not in this memory")
            for listener in reversed(self._listeners):
                listener.region_removed(region)
            self._regions.remove(region)
        if region.kind is not RegionKind.BAR:
            region.mapping.close()

    def close(self) -> None:
        """Release all memory. Mirrors must be closed before; they are not told."""
        with self._lock:
            self._listeners.clear()
            regions, self._regions = self._regions, []
        for region in regions:
            if region.kind is not RegionKind.BAR:
                region.mapping.close()

    # --- reaching the bytes

    @property
    def ram_size(self) -> int:
        """Bytes of RAM in all regions."""
        return sum(region.size for region in self._regions if region.kind is RegionKind.RAM)

    def populate(self) -> None:
        """Allocate every page of RAM and ROM now. Raises ``OSError`` (``ENOMEM``)."""
        for region in self:
            if region.dma:
                region.mapping.populate()

    def find(self, gpa: int) -> MemoryRegion | None:
        """The RAM or ROM region that holds ``gpa``."""
        for region in self._regions:
            if region.dma and region.gpa <= gpa < region.range.end:
                return region
        return None

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable buffer of guest memory inside one region. Raises ``IndexError`` where there is none."""
        region = self.find(gpa)
        if region is None or gpa + size > region.range.end:
            raise IndexError(f"guest-physical {gpa:#x}+{size:#x} is not in one region of guest memory")
        return region.mapping.view(region.offset + gpa - region.gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes from ``gpa`` on. Raises ``IndexError`` outside guest memory."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Put ``data`` at ``gpa``, in ROM too. Raises ``IndexError`` outside guest memory."""
        self.view(gpa, len(data))[:] = data
