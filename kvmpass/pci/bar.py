"""A BAR in the guest: memslots over what can be mapped, exits for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Protocol

from kvmpass._dataclass import dataclass
from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import LayoutError
from kvmpass.kvm import FastFile, FastRegisters
from kvmpass.layout import PAGE, Range
from kvmpass.memory import HostMapping, MemoryRegion
from kvmpass.pci.barspace import BarKind
from kvmpass.pci.configspace import guarded
from kvmpass.pci.fastbar import FastBar
from kvmpass.pci.function import BarSource, Wiring

log = limited_log(__name__)

FLAG_IO = 1
"""Bit 0 of a BAR's register: I/O ports, not memory."""
_FLAGS_MEMORY64 = 0b100
_ROM_ENABLE = 1
_ROM_GRANULE = 0x800  # the lowest address bit of the expansion ROM's register is bit 11


class Trapped(Protocol):
    """Emulated registers inside a BAR, such as the MSI-X table. Offsets are relative to them, accesses inside."""

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``."""


@dataclass(frozen=True, slots=True)
class Trap:
    """Emulated registers and their place."""

    range: Range
    """Where they are, relative to the BAR."""
    device: Trapped
    """The registers."""
    name: str = "registers"
    """What they are."""
    connect: Callable[[Bar], None] = lambda bar: None
    """Called with the BAR that has them, before it decodes."""
    registers: FastRegisters | None = None
    """What ``device`` reads, if that is also possible on the fast path."""


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A register that KVM writes to an eventfd instead of exiting: ``Vm.ioeventfd``."""

    offset: int
    """Where it is, relative to the BAR."""
    size: int
    """Bytes of an access; others exit."""
    eventfd: int
    """What is signalled."""


def mappable(areas: Sequence[Range], trapped: Sequence[Range] = ()) -> list[Range]:
    """Return the whole pages of ``areas`` without those that ``trapped`` ranges touch, in order."""
    cuts = [Range(-(-a.start // PAGE) * PAGE, a.end // PAGE * PAGE - -(-a.start // PAGE) * PAGE) for a in areas]
    for trap in trapped:
        low, high = trap.start // PAGE * PAGE, -(-trap.end // PAGE) * PAGE
        parts = [(cut.start, min(cut.end, low)) for cut in cuts] + [(max(cut.start, high), cut.end) for cut in cuts]
        cuts = [Range(start, end - start) for start, end in parts if end > start]
    return sorted(cut for cut in cuts if cut.size > 0)


class Bar:
    """One BAR: its register, and its ranges in the guest's address space while it decodes.

    ``name``: of its memory regions; ``flags``: the register's low bits; ``pages``: what is in pages of the source,
    by their offsets, for statistics; ``collected``: as ``collect``, from the start; ``file``: that of ``source``, for
    the fast path. A ``BusDevice``: accesses without a memslot go to a trap or to the source. Raises
    ``LayoutError`` where no address is free, ``OSError``.

    Synchronization: with the bus lock held.
    """

    def __init__(
        self,
        name: str,
        source: BarSource,
        flags: int,
        wiring: Wiring,
        traps: Sequence[Trap] = (),
        doorbells: Sequence[Doorbell] = (),
        pages: Mapping[int, str] = MappingProxyType({}),
        collected: Sequence[Range] = (),
        file: FastFile | None = None,
    ) -> None:
        self.name = name
        """The name of its memory regions, such as ``bar0``."""
        self._label = f"{wiring.place} {name}"
        self._pages = pages
        self._source = source
        self._memory = wiring.memory
        self._vm = wiring.vm
        self._doorbells = tuple(doorbells)
        self._armed: list[tuple[Doorbell, int]] = []  # those that KVM has, and where
        self._collected = {*collected}
        self._collecting: dict[Range, Range] = {}  # those that KVM collects, and where
        self._bus = wiring.ports if flags & FLAG_IO else wiring.mmio
        self._windows = wiring.bars
        self._traps = tuple(traps)
        self.size = 1 << (source.size - 1).bit_length()
        """Bytes, a power of two."""
        fastpath = None if flags & FLAG_IO else wiring.fastpath
        self._fast = FastBar(fastpath, self.size, [(trap.range, trap.registers) for trap in traps], file)
        self.flags = flags & (0b11 if flags & FLAG_IO else 0b1111)
        """Low bits of the register: kind, prefetchable."""
        if flags & FLAG_IO:
            self.kind = BarKind.IO
            """What it decodes."""
        else:
            self.kind = BarKind.MEMORY64 if flags & 0b110 == _FLAGS_MEMORY64 else BarKind.MEMORY32
        self._wanted = False
        self._sizing = False
        self._connected = False  # on the bus
        self._mappings: list[tuple[Range, HostMapping]] = []
        self._shown: dict[HostMapping, MemoryRegion] = {}  # those that have a memslot
        self._closed = False
        self._home = self._windows.allocate(self.kind, self.size)
        self.address = self._home.start
        """Where it decodes, as the guest last wrote it."""
        with undo_on_error(self.close):
            if self.kind is not BarKind.IO:
                for area in mappable(source.mmap_areas, [trap.range for trap in traps]):
                    self._mappings.append((area, source.mmap(area)))
            for trap in traps:
                trap.connect(self)

    def close(self) -> None:
        """Stop decoding, then unmap the BAR in this process: a mapping keeps the device open. Idempotent.

        Raises ``OSError`` where KVM keeps a memslot: its pages stay mapped, and ``close`` can be called again.
        """
        self.decode(False)
        if not self._closed:
            run_all(*(mapping.close for _, mapping in self._mappings))
            self._windows.free(self.kind, self._home)
            self._closed = True

    # --- registers

    @property
    def enabled(self) -> bool:
        """Whether the BAR's own register enables it; always but for an expansion ROM."""
        return True

    def register(self, high: bool) -> int:
        """Return the register's value: address and flags, or the upper half (``high``) of a 64-bit address."""
        return self.address >> 32 if high else self.address & 0xFFFF_FFFF | self.flags

    def set_register(self, value: int, high: bool) -> None:
        """Handle the guest's write of a dword. Address bits below the size read as zeroes.

        A lower half of all ones sizes the BAR: nothing is decoded then. An upper half of all ones is outside of every
        window. Raises ``OSError`` as ``decode`` does; the register is then unchanged.
        """
        shift = 32 if high else 0
        kept = self.address & ~(0xFFFF_FFFF << shift)
        address = (kept | value << shift) & ~(max(self.size, 4) - 1)
        self._move(address, self._sizing if high else value == 0xFFFF_FFFF)

    def _move(self, address: int, sizing: bool) -> None:
        if address != self.address or sizing:
            self._disconnect()
        self.address, self._sizing = address, sizing
        if self._connected:
            self._show_again()
        elif self._wanted:
            self._connect()

    # --- decoding

    def decode(self, wanted: bool) -> None:
        """Decode, or stop decoding, as command register and power state say.

        Raises ``OSError`` where KVM keeps a memslot: the BAR then decodes as before.
        """
        wanted = wanted and self.enabled and not self._closed
        if wanted == self._wanted:
            return
        if not wanted:
            self._disconnect()
            self._windows.forget(self)
        self._wanted = wanted
        if wanted:
            self._connect()

    def retry(self) -> None:
        """Decode after all, if the addresses are free now."""
        if self._wanted and not self._connected:
            self._connect()

    def _connect(self) -> None:
        """Decode at ``address`` if it is in a window and free; otherwise do nothing. Does not raise."""
        here = Range(self.address, self.size)
        if self._sizing or not self._windows.allows(self.kind, here):
            log.debug("%s at %s: not decoded there", self.name, here)
            return
        try:
            self._bus.add(here.start, here.size, self, self.label)
            self._connected = True
            self._windows.forget(self)
            self._show()
            self._arm()
            self._fast.show(self.address, self.label)
        except LayoutError as error:
            log.debug("%s at %s: waits: %s", self.name, here, error)
            self._windows.wait(self)
            with log_errors(log, "%s at %s: decoded in part: %s", self.name, here):
                self._withdraw()

    # --- the memslots, while it decodes

    def _show(self) -> None:
        """Create the missing memslots. Where KVM refuses one, accesses exit: slower, but correct."""
        for area, mapping in self._mappings:
            if mapping not in self._shown:
                at = self.address + area.start
                try:
                    self._shown[mapping] = self._memory.add_bar(at, area.size, mapping, 0, self.name)
                except OSError as error:
                    log.warning("%s at %s: by system call: %s", self.name, Range(at, area.size), error)
                    # If KVM may have the slot nevertheless, the region is in the list.
                    left = next((region for region in self._memory if region.mapping is mapping), None)
                    if left is not None:
                        self._shown[mapping] = left

    def _show_again(self) -> None:
        """Create memslots that KVM has refused or deleted; where another region overlaps, accesses exit."""
        with suppress(LayoutError):
            self._show()

    def _disconnect(self) -> None:
        """Take the BAR off the bus. Raises ``OSError`` if KVM keeps a memslot: the BAR then decodes as before."""
        if self._connected:
            self._withdraw()
            self._windows.released()

    def _withdraw(self) -> None:
        """Delete the memslots and leave the bus, without a retry of waiting BARs. Raises as ``_disconnect`` does."""
        # First, and for good: where KVM keeps a memslot the device may be closed nevertheless, and its descriptor be
        # used again. Accesses that this leaves to Python are slower, but correct.
        self._fast.hide()
        try:
            while self._shown:
                mapping, region = next(reversed(self._shown.items()))
                self._memory.remove(region)
                del self._shown[mapping]
        except OSError:
            self._show_again()
            raise
        self._disarm()
        self._bus.remove(self)
        self._connected = False

    # --- the doorbells, while it decodes

    def _arm(self) -> None:
        """Hand the doorbells to KVM. Where it refuses one, writes exit: slower, but correct."""
        for doorbell in self._doorbells:
            at = self.address + doorbell.offset
            with log_errors(log, "%s: %s", self.name):
                self._vm.ioeventfd(doorbell.eventfd, at, doorbell.size)
                self._armed.append((doorbell, at))
        for part in self._collected:
            self._start_collecting(part)

    def _disarm(self) -> None:
        """Take the doorbells back. One that KVM keeps signals its eventfd, and does no harm."""
        armed, self._armed = self._armed, []
        for doorbell, at in armed:
            with log_errors(log, "%s: %s", self.name):
                if not self._vm.closed:  # a closed VM has none
                    self._vm.ioeventfd_deassign(doorbell.eventfd, at, doorbell.size)
        for part in [*self._collecting]:
            self._stop_collecting(part)

    # --- registers that the guest writes without an effect yet

    def collect(self, part: Range, wanted: bool) -> None:
        """Let KVM collect the guest's writes to ``part`` until another access exits, or stop it. Does not raise.

        Only for registers whose writes have no effect before such an access. Reads exit. Idempotent.
        """
        if wanted and part not in self._collected:
            self._collected.add(part)
            if self._connected:
                self._start_collecting(part)
        elif not wanted:
            self._collected.discard(part)
            self._stop_collecting(part)

    def _start_collecting(self, part: Range) -> None:
        """Where KVM refuses, writes exit: slower, but correct."""
        if self.kind is not BarKind.IO:
            with log_errors(log, "%s: %s", self.name):
                at = Range(self.address + part.start, part.size)
                self._vm.coalesce_writes(at.start, at.size)
                self._collecting[part] = at

    def _stop_collecting(self, part: Range) -> None:
        at = self._collecting.pop(part, None)
        if at is not None and not self._vm.closed:
            with log_errors(log, "%s: %s", self.name):
                self._vm.stop_coalescing(at.start, at.size)

    # --- accesses without a memslot

    def label(self, offset: int) -> str:
        """Return what is at ``offset``, for statistics."""
        trapped = (trap.name for trap in self._traps if trap.range.start <= offset < trap.range.end)
        part = next(trapped, self._pages.get(offset // PAGE * PAGE))
        return f"{self._label} {part}" if part else self._label

    def read(self, offset: int, size: int) -> bytes:
        """Read from a trap or from the source; ones outside of it, or where it fails."""
        for trap in self._traps:
            if trap.range.contains(Range(offset, size)):
                return trap.device.read(offset - trap.range.start, size)
        if offset + size > self._source.size:
            return b"\xff" * size
        return guarded(lambda: self._source.read(offset, size), b"\xff" * size)

    def write(self, offset: int, data: bytes) -> None:
        """Write to a trap or to the source; dropped outside of it, across a trap's end, or where it fails."""
        here = Range(offset, len(data))
        for trap in self._traps:
            if trap.range.overlaps(here):
                if trap.range.contains(here):
                    trap.device.write(offset - trap.range.start, data)
                return
        if here.end <= self._source.size:
            guarded(lambda: self._source.write(offset, data), None)


class RomBar(Bar):
    """The expansion ROM: a read-only BAR that decodes while bit 0 of its register is set.

    (PCI Local Bus 3.0, section 6.2.5.2.)
    """

    def __init__(self, source: BarSource, wiring: Wiring) -> None:
        self._enable = False
        super().__init__("rom", source, 0, wiring)
        self.size = max(self.size, _ROM_GRANULE)

    @property
    def enabled(self) -> bool:
        """Bit 0 of the register."""
        return self._enable

    def register(self, high: bool) -> int:
        """Return the register's value: address and enable bit."""
        return self.address | (_ROM_ENABLE if self._enable else 0)

    def set_register(self, value: int, high: bool) -> None:
        """Handle the guest's write of the register. Raises as ``Bar.set_register`` does."""
        self._move(value & ~(self.size - 1) & 0xFFFF_FFFF, False)
        self._enable = bool(value & _ROM_ENABLE)

    def write(self, offset: int, data: bytes) -> None:
        """Drop the write."""
