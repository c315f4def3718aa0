"""Guest memory: the list of regions, and access to their bytes.

A region is RAM, ROM (guest and devices read it), BAR (memory of an assigned device, which the guest reaches by a
memslot, and other devices only in a domain with peer-to-peer) or registers (of an emulated device, which the guest
reads by a memslot). Memslots and DMA mappings follow the list as its listeners.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from kvmpass._dataclass import dataclass
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import AuditFailed, LayoutError
from kvmpass.layout import PAGE, Range
from kvmpass.memory.mapping import HUGE, Backing, HostMapping, StopFlag, check_file, check_huge_pages, make_memfd

ADDRESS_BITS = 52  # of a physical address (AMD64 manual volume 2, section 5.3)


class RegionKind(enum.Enum):
    """The kind of a region."""

    RAM = "ram"
    """Guest and devices read and write it."""
    ROM = "rom"
    """Guest and devices read it."""
    BAR = "bar"
    """The guest reads and writes it."""
    REGISTERS = "registers"
    """The guest reads it, and exits where it writes."""

    @property
    def guest_writable(self) -> bool:
        """Whether the guest can write it."""
        return self in (RegionKind.RAM, RegionKind.BAR)

    @property
    def dma(self) -> bool:
        """Whether devices reach it in any domain: RAM and ROM, not another device's BAR or registers."""
        return self in (RegionKind.RAM, RegionKind.ROM)

    @property
    def dma_writable(self) -> bool:
        """Whether devices that reach it can write it."""
        return self in (RegionKind.RAM, RegionKind.BAR)


@dataclass(eq=False, repr=False, slots=True)
class MemoryRegion:
    """Contiguous guest-physical pages with one backing. Compared by identity."""

    kind: RegionKind
    """RAM, ROM, BAR or registers."""
    range: Range
    """Guest-physical addresses."""
    mapping: HostMapping
    """The host virtual mapping that contains it. ``release()`` unmaps that of RAM and ROM."""
    name: str
    """Its name in messages."""
    backing: Backing = Backing.ANONYMOUS
    """What holds its bytes."""
    offset: int = 0
    """Bytes from the start of ``mapping``."""
    file: int = -1
    """A descriptor of RAM that is a file or memfd, for other processes; -1: private. ``release()`` closes it."""
    file_offset: int = 0
    """Bytes from the start of that file."""

    @property
    def gpa(self) -> int:
        """The guest-physical address."""
        return self.range.start

    @property
    def size(self) -> int:
        """Bytes."""
        return self.range.size

    @property
    def hva(self) -> int:
        """The host virtual address. Raises ``Closed`` after ``release()``."""
        return self.mapping.address + self.offset

    def release(self) -> None:
        """Unmap RAM and ROM; the mapping of a BAR or of registers belongs to their device."""
        if self.kind.dma:
            self.mapping.close()
            file, self.file = self.file, -1
            if file >= 0:
                os.close(file)

    def __repr__(self) -> str:
        return f"<{self.name} {self.kind.value} {self.range}>"


class RegionListener(Protocol):
    """Follows the list. ``region_wanted`` and ``region_added`` may raise, and must have changed nothing then.

    Synchronization: called with ``GuestMemory.lock`` held.
    """

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """Check a new region before it is mapped. Raise to refuse it."""

    def region_added(self, region: MemoryRegion) -> None:
        """Use a region that is mapped now. Raise to refuse it."""

    def region_removed(self, region: MemoryRegion) -> None:
        """Stop using a region, before it is unmapped. If this raises, the region stays."""

    def holds(self, region: MemoryRegion) -> bool:
        """Return whether guest or devices may still reach the region through this listener."""


def _check_pages(range_: Range, name: str, page: int) -> None:
    if range_.start % page or range_.size % page or range_.size <= 0 or range_.start < 0:
        size = f"{page} bytes" if page == PAGE else f"{page >> 20} MiB"
        raise LayoutError(f"{name}: {range_} is not whole pages of {size}")
    if range_.end > 1 << ADDRESS_BITS:
        raise LayoutError(f"{name}: {range_} is beyond {ADDRESS_BITS} bits, the width of a physical address")


class GuestMemory:
    """The list of regions. ``read`` and ``write`` access RAM and ROM by guest-physical address.

    Synchronization: from any thread; ``lock`` guards the list, which can be iterated without it. Accesses to memory
    are not synchronized, as those of a CPU.
    """

    def __init__(self) -> None:
        # Replaced, never changed: an iteration without the lock sees one state of the list.
        self._regions: tuple[MemoryRegion, ...] = ()
        # What ``_around`` has found last: the list then, the region, its start, end and bytes.
        self._accessed: tuple[object, MemoryRegion | None, tuple[int, int, memoryview]]
        self._accessed = None, None, (0, 0, memoryview(b""))
        self._listeners: list[RegionListener] = []
        self.lock = threading.RLock()
        """Held while the list changes; hold it to keep the list as it is."""

    def __iter__(self) -> Iterator[MemoryRegion]:
        return iter(sorted(self._regions, key=lambda region: region.gpa))

    def __len__(self) -> int:
        return len(self._regions)

    def listen(self, listener: RegionListener) -> None:
        """Register ``listener``, and add all present regions to it, or none if it raises."""
        with self.lock, undo_on_error() as undo:
            for region in self:
                listener.region_wanted(region.kind, region.range, region.name)
                listener.region_added(region)
                undo.callback(listener.region_removed, region)
            self._listeners.append(listener)

    def unlisten(self, listener: RegionListener) -> None:
        """Unregister ``listener``, without a call of its methods. Idempotent."""
        with self.lock:
            self._listeners = [other for other in self._listeners if other is not listener]

    # --- changing the list

    def add_ram(
        self, gpa: int, size: int, name: str = "ram", *, backing: Backing = Backing.ANONYMOUS
    ) -> MemoryRegion:
        """Add ``size`` bytes of zeroed memory, at a host virtual address congruent to ``gpa`` modulo 2 MiB.

        ``backing``: private memory, anonymous or from a pool of huge pages (1 GiB pages: congruent modulo 1 GiB), or
        a memfd of either kind. Raises ``LayoutError`` (not whole pages, overlap), ``NotEnoughMemory`` (huge pages),
        ``OSError``, and what a listener raises (``ReservedRange``).
        """
        if backing in (Backing.SHARED, Backing.DEVICE):
            raise LayoutError(f"{name}: {backing} memory is not made here: see add_shared and add_bar")
        page = backing.page_size
        with self._claim(RegionKind.RAM, gpa, size, name, page) as range_:
            if page > PAGE:
                check_huge_pages(page, size)
            file = make_memfd(name, size, page) if backing.is_memfd else -1
            with undo_on_error() as undo:
                if file >= 0:
                    undo.callback(os.close, file)
                mapping = HostMapping(size, align=max(HUGE, page), congruent=gpa, fd=file, page=page)
            if page == PAGE and size >= HUGE:
                mapping.advise_huge()
            return self._add(MemoryRegion(RegionKind.RAM, range_, mapping, name, backing, file=file))

    def add_shared(
        self, gpa: int, fd: int, size: int, offset: int = 0, name: str = "shared", *, writable: bool = True
    ) -> MemoryRegion:
        """Add ``size`` bytes of a file or memfd from ``offset`` on, which other processes may map too.

        RAM, or ROM if not ``writable``: then ``fd`` may be open for reading only, and other processes can change what
        guest and devices read. The caller may close ``fd``: of RAM a duplicate is kept, for daemons. Seal a memfd
        against shrinking (``F_SEAL_SHRINK``): a process that truncates it removes the pages. One that punches a hole
        into it separates guest and device: the device keeps the page that was there, the guest gets a new one.

        Raises ``LayoutError`` (not whole pages of this file, beyond its end, overlap), what a listener raises, and
        ``OSError``: ``EBADF``, ``EACCES`` (not open for that), ``EPERM`` (sealed). Files whose pages the kernel
        writes back to a disk cannot be pinned for writing: assigning a device fails with ``EFAULT`` then.
        """
        kind = RegionKind.RAM if writable else RegionKind.ROM
        with self._claim(kind, gpa, size, name) as range_:
            page = check_file(fd, offset, size, name)
            _check_pages(range_, name, page)
            mapping = HostMapping(
                size, align=max(HUGE, page), congruent=gpa, fd=fd, offset=offset, writable=writable, page=page
            )
            with undo_on_error(mapping.close):
                file = os.dup(fd) if writable else -1
            return self._add(MemoryRegion(kind, range_, mapping, name, Backing.SHARED, 0, file, offset))

    def add_rom(self, gpa: int, data: bytes, name: str = "rom") -> MemoryRegion:
        """Add pages with ``data``, rounded up to pages, which neither guest nor devices can write.

        Raises as ``add_ram`` does.
        """
        size = -(-len(data) // PAGE) * PAGE
        with self._claim(RegionKind.ROM, gpa, size, name) as range_:
            mapping = HostMapping(size, align=HUGE, congruent=gpa)
            mapping.view(0, len(data))[:] = data
            return self._add(MemoryRegion(RegionKind.ROM, range_, mapping, name))

    def add_bar(self, gpa: int, size: int, mapping: HostMapping, offset: int, name: str) -> MemoryRegion:
        """Add part of a device's BAR. The mapping remains the caller's: remove the region, then close it."""
        with self._claim(RegionKind.BAR, gpa, size, name) as range_:
            return self._add(MemoryRegion(RegionKind.BAR, range_, mapping, name, Backing.DEVICE, offset))

    def add_registers(self, gpa: int, size: int, mapping: HostMapping, offset: int, name: str) -> MemoryRegion:
        """Add registers that the guest reads without an exit, as ``add_bar`` does."""
        with self._claim(RegionKind.REGISTERS, gpa, size, name) as range_:
            return self._add(MemoryRegion(RegionKind.REGISTERS, range_, mapping, name, Backing.DEVICE, offset))

    @contextmanager
    def _claim(self, kind: RegionKind, gpa: int, size: int, name: str, page: int = PAGE) -> Iterator[Range]:
        """Hold the lock. Raises, before anything is mapped, if another region or a listener refuses the range."""
        range_ = Range(gpa, size)
        _check_pages(range_, name, page)
        with self.lock:
            for other in self._regions:
                if other.range.overlaps(range_):
                    raise LayoutError(f"{name} {range_} overlaps {other.name} {other.range}")
            for listener in self._listeners:
                listener.region_wanted(kind, range_, name)
            yield range_

    def _add(self, region: MemoryRegion) -> MemoryRegion:
        """Add ``region`` to every listener, or to none. If it cannot be removed again, it stays in the list."""
        done: list[RegionListener] = []
        try:
            for listener in self._listeners:
                listener.region_added(region)
                done.append(listener)
        except BaseException as error:
            run_all(*(partial(listener.region_removed, region) for listener in reversed(done)), failure=error)
            if self._held(region):
                self._regions = (*self._regions, region)
            else:
                region.release()
            raise
        self._regions = (*self._regions, region)
        return region

    def _held(self, region: MemoryRegion) -> bool:
        """Return whether the region may still be in use: then it is never unmapped."""
        return any(listener.holds(region) for listener in self._listeners)

    def remove(self, region: MemoryRegion) -> None:
        """Remove the region from every listener, then from the list, and unmap it (a BAR's mapping remains).

        If a listener raises, the region is added to the others again, and stays.
        """
        with self.lock:
            if region not in self._regions:
                raise LayoutError(f"{region.name} {region.range} is not in this memory")
            done: list[RegionListener] = []
            try:
                for listener in reversed(self._listeners):
                    listener.region_removed(region)
                    done.append(listener)
            except BaseException as error:
                run_all(*(partial(listener.region_added, region) for listener in reversed(done)), failure=error)
                raise
            self._regions = tuple(other for other in self._regions if other is not region)
        region.release()

    def close(self) -> None:
        """Unmap all memory. Close the listeners first: their methods are not called.

        Raises ``AuditFailed`` if one of them still holds a region: the region stays, and ``close`` can be called
        again.
        """
        with self.lock:
            held = tuple(region for region in self._regions if self._held(region))
            gone = [region for region in self._regions if region not in held]
            self._regions = held
            run_all(*(region.release for region in gone))
            if held:
                names = ", ".join(f"{region.name} {region.range}" for region in held)
                raise AuditFailed(f"still in use, and therefore not unmapped: {names}")
            self._listeners.clear()

    # --- reaching the bytes

    @property
    def ram_size(self) -> int:
        """Bytes of RAM in all regions."""
        return sum(region.size for region in self._regions if region.kind is RegionKind.RAM)

    @property
    def ordinary_size(self) -> int:
        """Bytes of ordinary pages that are made here, which the host's free memory must provide."""
        ordinary = (Backing.ANONYMOUS, Backing.MEMFD)
        return sum(region.size for region in self._regions if region.backing in ordinary)

    def populate(self, stop: StopFlag | None = None) -> None:
        """Allocate every page of RAM and ROM now, until ``stop`` is set. Raises ``OSError`` (``ENOMEM``)."""
        for region in self:
            if region.kind.dma:
                region.mapping.populate(stop)

    def find(self, gpa: int) -> MemoryRegion | None:
        """Return the RAM or ROM region that contains ``gpa``."""
        for region in self._regions:
            if region.gpa <= gpa < region.range.end and region.kind.dma:
                return region
        return None

    def view(self, gpa: int, size: int) -> memoryview:
        """Return ``size`` bytes from ``gpa`` on, writable unless the region is a file mapped for reading only.

        Raises ``IndexError`` unless they are in one region of RAM or ROM.
        """
        region = self.find(gpa)
        if region is None or gpa + size > region.range.end:
            raise IndexError(f"guest-physical {gpa:#x}+{size:#x} is not in one region of guest memory")
        return region.mapping.view(region.offset + gpa - region.gpa, size)

    @property
    def state(self) -> object:
        """A value that is another object after each change of the list: for what keeps views of it."""
        return self._regions

    def dma_views(self, parts: Iterable[tuple[int, int]], *, write: bool) -> list[memoryview]:
        """Return what an emulated device reads, or writes, at guest-physical addresses with sizes: views, in order.

        Raises ``IndexError`` unless a device reaches all of them by DMA. Views are valid while ``lock`` is held, or
        the regions stay in the list.
        """
        views: list[memoryview] = []
        start = end = 0
        for gpa, size in parts:
            while size > 0:
                if not start <= gpa < end:
                    start, end, whole = self._around(gpa, write=write)
                length = size if gpa + size <= end else end - gpa
                views.append(whole[gpa - start : gpa - start + length])
                gpa, size = gpa + length, size - length
        return views

    def _around(self, gpa: int, *, write: bool) -> tuple[int, int, memoryview]:
        """Return start, end and all bytes of the region in which a device may access ``gpa``."""
        regions, region, found = self._accessed
        if regions is not self._regions or not found[0] <= gpa < found[1]:
            region = self.find(gpa)
            if region is not None:
                found = region.gpa, region.range.end, region.mapping.view(region.offset, region.size)
                self._accessed = self._regions, region, found
        if region is None or (write and not region.kind.dma_writable):
            raise IndexError(f"guest-physical {gpa:#x} is no memory that a device may access")
        return found

    def read(self, gpa: int, size: int) -> bytes:
        """Read ``size`` bytes from ``gpa`` on. Raises ``IndexError`` outside guest memory."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` to ``gpa``, ROM too.

        Raises ``IndexError`` outside guest memory, ``OSError`` (``EACCES``) in a file mapped for reading only.
        """
        view = self.view(gpa, len(data))
        if view.readonly:
            raise OSError(errno.EACCES, f"{os.strerror(errno.EACCES)}: guest-physical {gpa:#x} is a read-only file")
        view[:] = data
