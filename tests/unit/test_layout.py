"""Guest-physical layouts: RAM and windows avoid what the IOMMU does not translate."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.errors import LayoutError, ReservedRange
from kvmpass.layout import GIB, LOW_RAM_LIMIT, MIB, PAGE, Range, Reserved, plan_layout

MSI = Reserved(Range(0xFEE0_0000, MIB), "msi")
HYPERTRANSPORT = Reserved(Range(0xFD_0000_0000, 0x3_0000_0000), "reserved")
HOST = (MSI, HYPERTRANSPORT)


def test_small_memory_is_one_range() -> None:
    layout = plan_layout(GIB, HOST)
    assert layout.ram == (Range(0, GIB),)
    assert layout.mmio64.start == 4 * GIB


def test_memory_goes_around_the_hole_below_4_gib() -> None:
    layout = plan_layout(6 * GIB, HOST)
    assert layout.ram == (Range(0, LOW_RAM_LIMIT), Range(4 * GIB, 3 * GIB))
    assert layout.mmio64.start == 7 * GIB


def test_a_terabyte_goes_around_the_hypertransport_hole() -> None:
    layout = plan_layout(1024 * GIB, HOST, phys_bits=48)
    assert layout.ram[1] == Range(4 * GIB, 0xFD_0000_0000 - 4 * GIB)
    assert layout.ram[2].start == 0x100_0000_0000
    assert layout.ram_size == 1024 * GIB


def test_firmware_one_to_one_regions_are_no_holes() -> None:
    direct = Reserved(Range(0x1000_0000, MIB), "direct")
    assert plan_layout(GIB, (*HOST, direct)).ram == (Range(0, GIB),)


def test_a_reserved_range_in_low_memory_splits_it() -> None:
    hole = Reserved(Range(0x1000_0000, MIB), "reserved")
    assert plan_layout(GIB, (hole,)).ram == (Range(0, 0x1000_0000), Range(0x1010_0000, GIB - 0x1000_0000))


def test_a_window_that_is_reserved_is_refused_by_name() -> None:
    with pytest.raises(ReservedRange, match=r"32-bit BAR window .* 0xc8000000-0xc80fffff reserved"):
        plan_layout(GIB, (Reserved(Range(0xC800_0000, MIB), "reserved"),))


@pytest.mark.parametrize("size", [0, 4095, PAGE, MIB + 1, -MIB])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(LayoutError, match="at least 1 MiB"):
        plan_layout(size)


def test_more_than_the_processor_can_address() -> None:
    with pytest.raises(LayoutError, match="do not fit into 40 bits"):
        plan_layout(2048 * GIB, HOST, phys_bits=40)


holes = st.builds(
    lambda at, size: Reserved(Range(at * MIB, size * MIB), "reserved"),
    st.integers(8192, 1 << 20),
    st.integers(1, 65536),
)


@given(st.integers(256, 4 << 20), st.lists(holes, max_size=5))
def test_nothing_overlaps(pages: int, extra: list[Reserved]) -> None:
    layout = plan_layout(pages * PAGE * 16, [*HOST, *extra], phys_bits=48)
    assert layout.ram_size == pages * PAGE * 16
    parts = sorted([*layout.ram, layout.mmio32, layout.mmio64, layout.ecam])
    assert all(a.end <= b.start for a, b in itertools.pairwise(parts))
    for part in parts:
        assert not any(part.overlaps(hole.range) for hole in (*HOST, *extra))
