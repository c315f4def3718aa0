"""A BAR of an assigned function: its registers, where it decodes, and which accesses reach the device."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from support.fake_bar import IO, IO_RESERVED, MEMORY32, MEMORY64, ONES, PREFETCHABLE, GuestSpace, Region, Register

from kvmpass.errors import LayoutError
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import RegionKind
from kvmpass.pci.bar import Bar, Trap, mappable
from kvmpass.pci.barspace import BarKind


@pytest.fixture
def guest() -> Iterator[GuestSpace]:
    guest = GuestSpace()
    yield guest
    guest.close()


# --- what can be mapped


def test_pages_that_can_be_mapped_against_a_model() -> None:
    """Page by page: whole pages of an area that no trapped range touches."""
    rng = random.Random(11)
    for _ in range(300):
        cuts = sorted(rng.sample(range(0, 12 * PAGE, PAGE // 4), 4))
        areas = [Range(cuts[0], cuts[1] - cuts[0]), Range(cuts[2], cuts[3] - cuts[2])]
        sizes = rng.choices([8, 80, PAGE, 3 * PAGE], k=rng.randrange(3))
        traps = [Range(rng.randrange(0, 12 * PAGE, 8), size) for size in sizes]
        found = mappable(areas, traps)
        pages = {at for range_ in found for at in range(range_.start, range_.end, PAGE)}
        whole = [Range(at, PAGE) for at in range(0, 13 * PAGE, PAGE)]
        assert pages == {
            page.start
            for page in whole
            if any(area.contains(page) for area in areas) and not any(trap.overlaps(page) for trap in traps)
        }
        assert all(range_.size > 0 and range_.start % PAGE == 0 == range_.size % PAGE for range_ in found)
        assert all(one.end <= other.start for one, other in itertools.pairwise(found)), "in order, and apart"


def test_nothing_to_map() -> None:
    assert mappable([]) == [] == mappable([Range(0, PAGE - 1)]) == mappable([Range(1, PAGE)])
    assert mappable([Range(1, 2 * PAGE - 1)]) == [Range(PAGE, PAGE)]


# --- registers


@pytest.mark.parametrize(
    "flags, size, low, high",
    [
        (IO, 32, 0xFFFF_FFE1, None),
        (IO_RESERVED, 256, 0xFFFF_FF03, None),
        (IO | 0b1100, 16, 0xFFFF_FFF1, None),
        (IO, 1, 0xFFFF_FFFD, None),
        (MEMORY32, 256, 0xFFFF_FF00, None),
        (MEMORY32, PAGE, 0xFFFF_F000, None),
        (PREFETCHABLE, MIB, 0xFFF0_0008, None),
        (0b0010, PAGE, 0xFFFF_F002, None),
        (MEMORY64, 4 * PAGE, 0xFFFF_C004, 0xFFFF_FFFF),
        (MEMORY64 | PREFETCHABLE, 8 * GIB, 0x0000_000C, 0xFFFF_FFFE),
        (MEMORY32, 0x1800, 0xFFFF_E000, None),
        (MEMORY32 | 0xFFFF_F000, PAGE, 0xFFFF_F000, None),
    ],
)
def test_a_guest_sizes_it(guest: GuestSpace, flags: int, size: int, low: int, high: int | None) -> None:
    """All ones written: the size's bits and the flags read back (PCI Local Bus 3.0, section 6.2.5.1)."""
    bar = guest.bar(Region(size), flags)
    home = bar.address
    assert bar.register(False) == home & 0xFFFF_FFFF | low & (0b11 if flags & 1 else 0b1111)
    bar.set_register(0xFFFF_FFFF, False)
    assert bar.register(False) == low
    assert bar.address % max(4, bar.size) == 0
    if high is not None:
        bar.set_register(0xFFFF_FFFF, True)
        assert (bar.register(False), bar.register(True)) == (low, high)
        bar.set_register(home >> 32, True)
    bar.set_register(home & 0xFFFF_FFFF, False)
    assert bar.address == home


@pytest.mark.parametrize(
    "flags, kind",
    [
        (0b0000, BarKind.MEMORY32),
        (0b0010, BarKind.MEMORY32),
        (0b0100, BarKind.MEMORY64),
        (0b0110, BarKind.MEMORY32),
        (0b1000, BarKind.MEMORY32),
        (0b1100, BarKind.MEMORY64),
        (0b0001, BarKind.IO),
        (0b0101, BarKind.IO),
        (0b1111, BarKind.IO),
    ],
)
def test_kinds(guest: GuestSpace, flags: int, kind: BarKind) -> None:
    bar = guest.bar(Region(PAGE), flags)
    assert bar.kind is kind
    assert guest.space.allows(kind, Range(bar.address, bar.size))


def test_each_half_is_written_alone(guest: GuestSpace) -> None:
    bar = guest.bar(Region(PAGE), MEMORY64)
    bar.set_register(0x1234_5678, False)
    assert (bar.register(False), bar.register(True)) == (0x1234_5004, bar.address >> 32)
    bar.set_register(0x9ABC_DEF0, True)
    assert bar.address == 0x9ABC_DEF0_1234_5000
    bar.set_register(0x8000_0FFF, False)
    assert (bar.register(False), bar.register(True)) == (0x8000_0004, 0x9ABC_DEF0)


# --- decoding


def test_it_decodes_at_its_address_and_only_while_enabled(guest: GuestSpace) -> None:
    region = Region(4 * PAGE, [Range(0, 4 * PAGE)])
    bar = guest.bar(region, MEMORY64)
    assert (guest.slots, guest.bus.read(bar.address, 4)) == ([], ONES[:4])
    bar.decode(True)
    assert guest.slots == [Range(bar.address, 4 * PAGE)]
    [slot] = [r for r in guest.memory if r.kind is RegionKind.BAR]
    assert (slot.hva, slot.name) == (region.mappings[Range(0, 4 * PAGE)].address, "bar2")
    bar.decode(True)
    assert guest.bus.read(bar.address + 5, 2) == bytes(region.data[5:7])
    assert guest.bus.read(bar.address - 1, 1) == ONES[:1] == guest.bus.read(bar.address + 4 * PAGE, 1)
    bar.decode(False)
    assert (guest.slots, guest.bus.read(bar.address, 4)) == ([], ONES[:4])
    bar.decode(False)


def test_ports_are_trapped_as_a_whole(guest: GuestSpace) -> None:
    region = Region(32, [Range(0, 32)])
    bar = guest.bar(region, IO)
    bar.decode(True)
    assert region.mappings == {} and guest.slots == []
    assert guest.bus.read(0xC000 + 30, 2) == bytes(region.data[30:32])
    guest.bus.write(0xC000 + 31, b"\x5a")
    assert region.writes == [(31, b"\x5a")]


def test_it_moves_with_its_memslots(guest: GuestSpace) -> None:
    bar = guest.bar(Region(2 * PAGE, [Range(0, PAGE), Range(PAGE, PAGE)]), MEMORY32)
    bar.decode(True)
    home = bar.address
    bar.set_register(home + 64 * PAGE, False)
    assert guest.slots == [Range(home + 64 * PAGE, PAGE), Range(home + 65 * PAGE, PAGE)]
    assert guest.bus.read(home, 4) == ONES[:4]
    bar.set_register(home + 64 * PAGE, False)
    assert len(guest.slots) == 2
    for outside in (0, PAGE, guest.layout.ecam.start, 0xFEE0_0000, guest.layout.mmio32.end):
        bar.set_register(outside, False)
        assert guest.slots == [], hex(outside)
        assert guest.bus.read(outside & -2 * PAGE, 4) == ONES[:4]
    bar.set_register(guest.layout.mmio32.end - 2 * PAGE, False)
    assert len(guest.slots) == 2, "the last place"


def test_nothing_is_decoded_while_it_is_sized(guest: GuestSpace) -> None:
    """Also where all ones are a place like any other: the upper end of a window of ports."""
    bar = guest.bar(Region(64), IO)
    bar.decode(True)
    home = bar.address
    bar.set_register(0xFFFF_FFFF, False)
    assert guest.bus._ranges == []
    bar.set_register(home, False)
    assert guest.bus.read(home, 1) == b"\1"
    wide = guest.bar(Region(PAGE, [Range(0, PAGE)]), MEMORY64)
    wide.decode(True)
    wide.set_register(0xFFFF_FFFF, False)
    assert guest.slots == []
    wide.set_register(wide.address >> 32, True)
    assert guest.slots == [], "it still is"


def test_a_bar_waits_for_addresses_in_use(guest: GuestSpace) -> None:
    first, second = (guest.bar(Region(PAGE, [Range(0, PAGE)], index), MEMORY32) for index in (0, 1))
    first.decode(True)
    home, other = first.address, second.address
    second.set_register(home, False)
    second.decode(True)
    assert [r.name for r in guest.memory] == ["bar0"], "who came first keeps it"
    first.set_register(other, False)
    assert {r.name: r.gpa for r in guest.memory} == {"bar0": other, "bar1": home}
    second.decode(False)
    first.set_register(home, False)
    assert [r.name for r in guest.memory] == ["bar0"]
    second.decode(True)
    second.decode(False)
    first.decode(False)
    assert guest.slots == [], "who does not decode any more does not wait"
    second.retry()
    assert guest.slots == []


def test_a_bar_that_stops_waiting_leaves_the_queue(guest: GuestSpace) -> None:
    holder, first, second = (guest.bar(Region(PAGE, [Range(0, PAGE)], index), MEMORY32) for index in (0, 1, 2))
    home = holder.address
    holder.decode(True)
    for bar in (first, second):
        bar.set_register(home, False)
    first.decode(True)
    first.decode(False)
    second.decode(True)
    first.decode(True)
    holder.decode(False)
    assert [r.name for r in guest.memory] == ["bar2"]
    second.decode(False)
    assert [r.name for r in guest.memory] == ["bar1"]


def test_without_a_memslot_accesses_exit(guest: GuestSpace) -> None:
    bar = guest.bar(Region(PAGE, [Range(0, PAGE)]), MEMORY32)
    guest.kvm.refusing = "added"
    bar.decode(True)
    assert (guest.slots, len(guest.bus._ranges)) == ([], 1)
    guest.kvm.refusing = ""
    bar.set_register(bar.address, False)
    assert guest.slots == [Range(bar.address, PAGE)], "written again, it is tried again"


def test_pages_without_a_mapping_exit(guest: GuestSpace) -> None:
    region = Region(4 * PAGE, [Range(0, 4 * PAGE)])
    table = Register(64)
    bar = guest.bar(region, MEMORY32, [Trap(Range(2 * PAGE + 8, 64), table)])
    bar.decode(True)
    assert guest.slots == [Range(bar.address, 2 * PAGE), Range(bar.address + 3 * PAGE, PAGE)]
    assert sorted(region.mappings) == [Range(0, 2 * PAGE), Range(3 * PAGE, PAGE)]


class Collecting:
    """KVM's zones of collected writes."""

    closed = False

    def __init__(self) -> None:
        self.zones: list[tuple[int, int]] = []
        self.refuses = False

    def coalesce_writes(self, address: int, size: int) -> None:
        if self.refuses:
            raise OSError(errno.ENOSPC, "KVM_REGISTER_COALESCED_MMIO")
        self.zones.append((address, size))

    def stop_coalescing(self, address: int, size: int) -> None:
        self.zones.remove((address, size))


def test_writes_are_collected_where_the_bar_decodes(guest: GuestSpace) -> None:
    vm: Any = Collecting()
    wiring = replace(guest.wiring, vm=vm)
    bar = Bar("bar0", Region(PAGE), MEMORY32, wiring, collected=[Range(0, 20)])
    guest.bars.append(bar)
    bar.collect(Range(64, 16), True)
    assert vm.zones == [], "it does not decode yet"
    bar.decode(True)
    home = bar.address
    assert sorted(vm.zones) == [(home, 20), (home + 64, 16)]
    bar.collect(Range(64, 16), True)
    assert len(vm.zones) == 2, "idempotent"
    bar.collect(Range(0, 20), False)
    assert vm.zones == [(home + 64, 16)]
    bar.set_register(home + 4 * PAGE, False)
    assert vm.zones == [(home + 4 * PAGE + 64, 16)]
    bar.decode(False)
    assert vm.zones == []
    vm.refuses = True
    bar.decode(True)
    assert len(guest.bus._ranges) == 1, "it decodes, and every write exits"


def test_close_deletes_memslots_then_unmaps(guest: GuestSpace) -> None:
    region = Region(PAGE, [Range(0, PAGE)])
    bar = guest.bar(region, MEMORY32)
    bar.decode(True)
    order: list[str] = []
    mapping = region.mappings[Range(0, PAGE)]
    close = mapping.close
    mapping.close = lambda: (order.append(f"unmapped with {len(guest.slots)} slots"), close())[1]  # type: ignore[method-assign]
    bar.close()
    guest.bars.remove(bar)
    assert (order, region.unmapped) == (["unmapped with 0 slots"], True)
    assert guest.space.allocate(BarKind.MEMORY32, PAGE).start == bar.address, "its address is free"
    guest.space.free(BarKind.MEMORY32, Range(bar.address, PAGE))


def test_a_failed_constructor_leaves_nothing(guest: GuestSpace) -> None:
    region = Region(PAGE, [Range(0, PAGE)])
    region.refusing_mmap = True
    with pytest.raises(OSError, match="mmap"):
        Bar("bar2", region, MEMORY32, guest.wiring)
    assert guest.space.allocate(BarKind.MEMORY32, PAGE).start == guest.layout.mmio32.start
    guest.space.free(BarKind.MEMORY32, Range(guest.layout.mmio32.start, PAGE))
    with pytest.raises(LayoutError, match="no room"):
        Bar("bar2", Region(GIB), MEMORY32, guest.wiring)


# --- accesses that trap


@pytest.mark.parametrize("size", [1, 16, 100, 256, 0x1800])
def test_accesses_up_to_the_last_byte_reach_the_device(guest: GuestSpace, size: int) -> None:
    """A BAR is a power of two, what the device has of it may be less: behind that there is nothing."""
    region = Region(size)
    bar = guest.bar(region, MEMORY32)
    for length in range(1, 9):
        for offset in range(max(0, size - 9), size + 2):
            inside = offset + length <= size
            expected = bytes(region.data[offset : offset + length]) if inside else ONES[:length]
            assert bar.read(offset, length) == expected, (offset, length)
            region.writes.clear()
            bar.write(offset, expected)
            assert region.writes == ([(offset, expected)] if inside else []), (offset, length)


def test_what_vfio_refuses(guest: GuestSpace) -> None:
    region = Region(PAGE)
    bar = guest.bar(region, MEMORY32)
    region.refusing = True
    assert bar.read(0, 8) == ONES[:8]
    bar.write(0, bytes(8))
    assert region.writes == []


def test_trapped_parts_are_relative_and_never_reach_the_device(guest: GuestSpace) -> None:
    region, table, pending = Region(2 * PAGE), Register(80), Register(8)
    traps = [Trap(Range(0x800, 80), table), Trap(Range(0x1000, 8), pending)]
    bar = guest.bar(region, MEMORY32, traps)
    bar.write(0x800, b"abcd")
    bar.write(0x800 + 76, b"last")
    bar.write(0x1004, b"bits")
    assert (table.data[:4], table.data[76:], pending.data[4:]) == (b"abcd", b"last", b"bits")
    assert (bar.read(0x800, 4), bar.read(0x84C, 4), bar.read(0x1004, 4)) == (b"abcd", b"last", b"bits")
    assert region.writes == []
    for offset, size in ((0x7FE, 4), (0x84E, 4), (0x7F8, 0x100), (0xFFC, 8), (0x1006, 4)):
        before = bytes(table.data) + bytes(pending.data)
        bar.write(offset, bytes(size))
        assert bytes(table.data) + bytes(pending.data) == before, "half of it is nothing"
        assert region.writes == [], (hex(offset), size)
    for offset in (0x7FC, 0x850, 0xFFC, 0x1008):
        bar.write(offset, b"next")
        assert region.writes.pop() == (offset, b"next")
        assert bar.read(offset, 4) == b"next"


# --- the expansion ROM (PCI Local Bus 3.0, section 6.2.5.2)


def test_a_rom_has_its_own_enable_bit(guest: GuestSpace) -> None:
    region = Region(2 * PAGE)
    rom = guest.rom(region)
    home = rom.address
    assert (rom.register(False), rom.enabled) == (home, False)
    rom.decode(True)
    assert guest.bus.read(home, 2) == ONES[:2]
    rom.set_register(home | 1, False)
    assert (rom.register(False), rom.enabled) == (home | 1, True)
    rom.decode(True)
    assert guest.bus.read(home, 2) == bytes(region.data[:2])
    guest.bus.write(home, b"\0\0")
    assert region.writes == []
    rom.set_register(home, False)
    rom.decode(True)
    assert (rom.register(False), guest.bus.read(home, 2)) == (home, ONES[:2])


@pytest.mark.parametrize("size, mask", [(1, 0xFFFF_F800), (PAGE, 0xFFFF_F000), (64 * 1024, 0xFFFF_0000)])
def test_a_rom_is_sized_above_bit_10(guest: GuestSpace, size: int, mask: int) -> None:
    rom = guest.rom(Region(size))
    home = rom.address
    rom.set_register(0xFFFF_FFFE, False)
    assert rom.register(False) == mask
    rom.set_register(0xFFFF_FFFF, False)
    assert rom.register(False) == mask | 1
    rom.set_register(home, False)
    assert rom.register(False) == home


def test_a_rom_that_is_enabled_moves(guest: GuestSpace) -> None:
    region = Region(PAGE)
    rom = guest.rom(region)
    home = rom.address
    rom.set_register(home | 1, False)
    rom.decode(True)
    rom.set_register(home + 16 * PAGE | 1, False)
    assert guest.bus.read(home, 2) == ONES[:2]
    assert guest.bus.read(home + 16 * PAGE, 2) == bytes(region.data[:2])
    rom.set_register(0xFFFF_F801, False)
    assert guest.bus._ranges == [], "outside of the window"


def test_a_disabled_bar_no_longer_waits(guest: GuestSpace) -> None:
    """It got its place, is turned off, or moves: what it gives up is not offered to itself."""
    first, second = (guest.bar(Region(PAGE, [Range(0, PAGE)]), MEMORY32) for _ in range(2))
    first.decode(True)
    second.decode(True)
    home, place = second.address, first.address
    second.set_register(place, False)
    assert guest.slots == [Range(place, PAGE)], "it waits"
    second.set_register(home, False)
    assert len(guest.slots) == 2
    second.decode(False)
    assert guest.slots == [Range(place, PAGE)]
    second.set_register(place, False)
    second.decode(True)
    first.decode(False)
    assert guest.slots == [Range(place, PAGE)], "it got the place"
    second.set_register(home, False)
    assert guest.slots == [Range(home, PAGE)]
    second.decode(False)
    assert guest.slots == []
