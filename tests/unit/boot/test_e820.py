"""The memory map: sorted, without overlaps, complete."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.boot.e820 import E820Type, e820_map
from kvmpass.errors import LayoutError
from kvmpass.layout import (
    ECAM_BASE,
    ECAM_SIZE,
    GIB,
    HIGH_RAM_BASE,
    LOW_RAM_LIMIT,
    MIB,
    MMIO32_BASE,
    MMIO32_SIZE,
    Layout,
    Range,
    Reserved,
)

MSI = Reserved(Range(0xFEE0_0000, MIB), "msi")
HOLE = Reserved(Range(0xFD_0000_0000, 0x3_0000_0000), "reserved")


def layout(*ram: Range, reserved: tuple[Reserved, ...] = (MSI, HOLE)) -> Layout:
    mmio64 = Range(0x200_0000_0000, 0)
    return Layout(ram, Range(MMIO32_BASE, MMIO32_SIZE), mmio64, Range(ECAM_BASE, ECAM_SIZE), reserved)


@given(st.integers(1, LOW_RAM_LIMIT // (2 * MIB)), st.integers(0, 1 << 20))
def test_sorted_disjoint_and_complete(low: int, high: int) -> None:
    parts = [Range(0, low * 2 * MIB)]
    if high:
        parts.append(Range(HIGH_RAM_BASE, min(high * 2 * MIB, HOLE.range.start - HIGH_RAM_BASE)))
    entries = e820_map(layout(*parts))
    ranges = [entry.range for entry in entries]
    assert ranges == sorted(ranges)
    assert all(a.end <= b.start for a, b in itertools.pairwise(ranges))
    usable = sum(entry.range.size for entry in entries if entry.type is E820Type.USABLE)
    assert usable == sum(part.size for part in parts) - (MIB - 0x9FC00)
    for needed in (Range(ECAM_BASE, ECAM_SIZE), MSI.range):
        assert any(entry.range.contains(needed) for entry in entries if entry.type is E820Type.RESERVED)


def test_a_hole_between_ram_is_reserved_and_one_above_is_left_out() -> None:
    below = Range(HIGH_RAM_BASE, HOLE.range.start - HIGH_RAM_BASE)
    above = Range(HOLE.range.end, GIB)
    between = [entry.range for entry in e820_map(layout(Range(0, GIB), below, above))]
    assert HOLE.range in between
    assert HOLE.range not in [entry.range for entry in e820_map(layout(Range(0, GIB)))]


def test_direct_ranges_are_not_holes() -> None:
    direct = Reserved(Range(64 * MIB, MIB), "direct")
    assert all(entry.range != direct.range for entry in e820_map(layout(Range(0, GIB), reserved=(direct,))))


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(LayoutError, match="from address 0"):
        e820_map(layout(Range(HIGH_RAM_BASE, GIB)))
    with pytest.raises(LayoutError, match="overlaps the reserved range"):
        e820_map(layout(Range(0, GIB), reserved=(Reserved(Range(512 * MIB, MIB), "reserved"),)))


def test_packing() -> None:
    first = e820_map(layout(Range(0, GIB)))[0]
    assert first.pack() == bytes(8) + (0x9FC00).to_bytes(8, "little") + (1).to_bytes(4, "little")
