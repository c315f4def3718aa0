"""Guest-physical layouts: RAM and windows avoid what the IOMMU does not translate."""

import itertools
import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.errors import LayoutError, ReservedRange
from kvmpass.layout import (
    GIB,
    IO_WINDOW_BASE,
    IO_WINDOW_SIZE,
    IOAPIC_BASE,
    LOCAL_APIC_BASE,
    LOW_RAM_LIMIT,
    MIB,
    PAGE,
    Layout,
    Range,
    Reserved,
    find_reserved,
    parse_size,
    plan_layout,
    size_text,
)

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


def test_direct_mapped_regions_are_not_avoided() -> None:
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


def test_more_memory_than_the_processor_can_address() -> None:
    with pytest.raises(LayoutError, match="do not fit into 40 bits"):
        plan_layout(2048 * GIB, HOST, phys_bits=40)


# --- hosts of every width, and memory up to 4 TiB: no memory is behind these


TIB = 1024 * GIB
HOLE_AT, HOLE_END = HYPERTRANSPORT.range.start, HYPERTRANSPORT.range.end
SIZES = [MIB, 2 * MIB, GIB - PAGE, GIB, 3 * GIB, 3 * GIB + PAGE, 4 * GIB, 64 * GIB, 900 * GIB]
LARGE = [1008 * GIB, 1011 * GIB, 1011 * GIB + PAGE, TIB, 2 * TIB, 4 * TIB - PAGE, 4 * TIB]
HOSTS = {
    "plain": (),
    "msi": (MSI,),
    "hypertransport": HOST,
    "firmware": (
        *HOST,
        Reserved(Range(0x1000_0000, MIB), "direct"),
        Reserved(Range(0, 16 * MIB), "direct-relaxable"),
    ),
    "crowded": (
        *HOST,
        Reserved(Range(0x8000_0000, 0x1000), "reserved"),
        Reserved(Range(0x8000_0800, 0x1000), "reserved"),  # neither whole pages nor apart
        Reserved(Range(5 * GIB + 0x200, 0x10), "reserved"),
        Reserved(Range(20 * GIB, 3 * GIB), "msi"),
        Reserved(Range((1 << 47) - MIB, 2 * MIB), "reserved"),
        Reserved(Range(1 << 47, (1 << 64) - (1 << 47)), "reserved"),
    ),
}


def check(layout: Layout, size: int, reserved: Iterable[Reserved], bits: int, page: int = PAGE) -> None:
    """What holds for every layout."""
    assert layout.ram_size == size
    assert all(part.size and part.start % page == 0 and part.size % page == 0 for part in layout.ram)
    parts = sorted([*layout.ram, layout.mmio32, layout.mmio64, layout.ecam])
    assert all(a.end <= b.start for a, b in itertools.pairwise(parts))
    assert parts[0].start >= 0
    assert parts[-1].end <= 1 << min(bits, 48)
    holes = [line.range for line in reserved if not line.kind.startswith("direct")]
    assert not [(part, hole) for part in parts for hole in holes if part.overlaps(hole)]
    assert not [part for part in layout.ram if part.overlaps(Range(LOW_RAM_LIMIT, GIB))], (
        "RAM in the hole for devices"
    )
    window = layout.mmio64
    assert window.start >= layout.ram[-1].end
    assert (window.size >= GIB, window.start % GIB, window.size % GIB) == (True, 0, 0)


@pytest.mark.parametrize("bits", [40, 43, 48, 52])
@pytest.mark.parametrize("host", HOSTS)
def test_every_size_on_every_host(host: str, bits: int) -> None:
    reserved = HOSTS[host]
    for size in SIZES + (LARGE if bits > 40 else []):
        check(plan_layout(size, reserved, bits), size, reserved, bits)
    for page in (2 * MIB, GIB):
        for size in (size for size in SIZES + (LARGE if bits > 40 else []) if size % page == 0):
            check(plan_layout(size, reserved, bits, page), size, reserved, bits, page)


@pytest.mark.parametrize("bits", [43, 48, 52])
def test_four_terabytes_are_three_ranges(bits: int) -> None:
    layout = plan_layout(4 * TIB, HOST, bits)
    high = 4 * TIB - LOW_RAM_LIMIT - (HOLE_AT - 4 * GIB)
    assert layout.ram == (
        Range(0, LOW_RAM_LIMIT),
        Range(4 * GIB, HOLE_AT - 4 * GIB),
        Range(HOLE_END, high),
    )
    assert layout.mmio64 == Range(HOLE_END + high, (1 << min(bits, 48)) - HOLE_END - high)


def test_the_bar_window_is_the_largest_gap_above_ram() -> None:
    """40 bits: all that is left below the HyperTransport hole. More bits: what lies above it."""
    assert plan_layout(GIB, HOST, 40).mmio64 == Range(4 * GIB, HOLE_AT - 4 * GIB)
    assert plan_layout(8 * GIB, HOST, 40).mmio64 == Range(9 * GIB, HOLE_AT - 9 * GIB)
    assert plan_layout(GIB, HOST, 43).mmio64 == Range(HOLE_END, (1 << 43) - HOLE_END)
    assert plan_layout(GIB, HOST, 52).mmio64 == Range(HOLE_END, (1 << 48) - HOLE_END)
    assert plan_layout(GIB, (MSI,), 40).mmio64 == Range(4 * GIB, TIB - 4 * GIB)


@pytest.mark.parametrize("bits, largest", [(40, 512 * GIB), (43, 4 * TIB), (48, 128 * TIB)])
def test_large_bars_fit_at_their_own_alignment(bits: int, largest: int) -> None:
    """A BAR of half the address space's size: its only place may be the middle."""
    window = plan_layout(64 * GIB, HOST, bits).mmio64
    size = 128 * GIB
    while size <= largest // 2:
        assert -(-window.start // size) * size + size <= window.end, f"a BAR of {size >> 30} GiB"
        size *= 2


def test_memory_may_take_all_but_a_small_window() -> None:
    most = LOW_RAM_LIMIT + HOLE_AT - 4 * GIB
    assert plan_layout(most - GIB, HOST, 40).mmio64 == Range(HOLE_AT - GIB, GIB)
    assert plan_layout(most - 10 * GIB + PAGE, HOST, 40).mmio64.size == 9 * GIB
    with pytest.raises(LayoutError, match="leave no room for a window for BARs above 0xfcc0001000, in 40") as refused:
        plan_layout(most - GIB + PAGE, HOST, 40)
    assert "1 GiB less memory" in refused.value.__notes__[0]
    with pytest.raises(LayoutError, match="the largest gap has 0x0 bytes"):
        plan_layout(most, HOST, 40)
    with pytest.raises(LayoutError, match="do not fit into 40 bits"):
        plan_layout(most + PAGE, HOST, 40)


def test_a_processor_with_too_few_bits() -> None:
    with pytest.raises(LayoutError, match="no room for a window for BARs above 0x100000000, in 32 bits"):
        plan_layout(GIB, HOST, 32)


def test_huge_pages_make_whole_ranges() -> None:
    with pytest.raises(LayoutError, match="whole pages of 2 MiB"):
        plan_layout(3 * MIB, HOST, 40, 2 * MIB)
    with pytest.raises(LayoutError, match="whole pages of 1024 MiB"):
        plan_layout(1536 * MIB, HOST, 40, GIB)
    hole = Reserved(Range(GIB + MIB, MIB), "reserved")
    assert plan_layout(4 * GIB, (hole,), 40, GIB).ram == (
        Range(0, GIB),
        Range(2 * GIB, GIB),
        Range(4 * GIB, 2 * GIB),
    )


holes = st.builds(
    lambda at, size, kind: Reserved(Range(at * PAGE, size * PAGE), kind),
    st.integers(8192, 1 << 31),
    st.integers(1, 1 << 24),
    st.sampled_from(["reserved", "msi", "direct"]),
)


@given(
    st.integers(1, 1 << 21),
    st.lists(holes, max_size=8),
    st.sampled_from([40, 43, 48, 52]),
    st.sampled_from([PAGE, 2 * MIB, GIB]),
)
def test_nothing_overlaps(amount: int, extra: list[Reserved], bits: int, page: int) -> None:
    """Any host: either a layout that keeps every promise, or a refusal that says why."""
    size = -(-amount * 2 * MIB // page) * page
    reserved = [*HOST, *extra]
    try:
        layout = plan_layout(size, reserved, bits, page)
    except LayoutError as error:
        assert re.search("do not fit into|leave no room", str(error))
        return
    except ReservedRange as error:
        assert re.search(r"the (32-bit BAR window|ECAM) .* reserved range", str(error))
        return
    check(layout, size, reserved, bits, page)
    top = max(layout.ram[-1].end, 4 * GIB)
    largest = max(free(Range(top, (1 << min(bits, 48)) - top), reserved))
    assert layout.mmio64.size > largest - 2 * GIB, "a larger gap was left"


def free(space: Range, reserved: list[Reserved]) -> list[int]:
    """Sizes of what is free in ``space``."""
    at, sizes = space.start, [0]
    for start, end in sorted((line.range.start, line.range.end) for line in reserved if line.kind != "direct"):
        sizes.append(min(start, space.end) - at)
        at = max(at, end)
    return [*sizes, space.end - at]


# --- sizes and ranges


@pytest.mark.parametrize(
    "text, size",
    [
        ("4096", 4096),
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        ("1G", GIB),
        ("1GB", GIB),
        ("1GiB", GIB),
        (" 2 G ", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("0.5K", 0),
        ("8K", 2 * PAGE),
        ("2T", 2 * TIB),
        ("4097", PAGE),
        ("1.001M", MIB),
        (12345, 12345),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    """Whole pages, rounded down; a number is unchanged."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1X", "1,5G", "-1G", "1.G", ".5G", "1GG", "0x1000", "1 G B", "one"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(LayoutError, match="is not a size: write a number and K, M, G or T"):
        parse_size(text)


@pytest.mark.parametrize(
    "size, words",
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1025, "1025 bytes"),
        (PAGE, "4 KiB"),
        (MIB - 1024, "1023 KiB"),
        (MIB, "1 MiB"),
        (MIB + 1, "1048577 bytes"),
        (1536 * MIB, "1536 MiB"),
        (3 * GIB, "3 GiB"),
        (1024 * GIB, "1 TiB"),
        (1025 * GIB, "1025 GiB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    """In the largest unit that leaves no fraction."""
    assert size_text(size) == words


def test_ranges_end_before_their_end() -> None:
    whole = Range(0x1000, 0x2000)
    assert (whole.end, whole.last, str(whole)) == (0x3000, 0x2FFF, "0x1000-0x2fff")
    for other, overlaps, contains in (
        (Range(0, 0x1000), False, False),
        (Range(0, 0x1001), True, False),
        (Range(0x1000, 0x2000), True, True),
        (Range(0x1000, 1), True, True),
        (Range(0x2FFF, 1), True, True),
        (Range(0x2FFF, 2), True, False),
        (Range(0x3000, 1), False, False),
        (Range(0xFFF, 0x2001), True, False),
        (Range(0, 0x10000), True, False),
    ):
        assert (whole.overlaps(other), other.overlaps(whole), whole.contains(other)) == (overlaps, overlaps, contains)
    assert sorted([Range(2, 1), Range(1, 5), Range(1, 2)]) == [Range(1, 2), Range(1, 5), Range(2, 1)]


# --- the map of a machine, which guests' tables and drivers of firmware know


def test_the_map_below_4_gib() -> None:
    """RAM, BARs, ECAM for one bus, IOAPIC, local APIC: as on a PC with a Q35 chipset, and apart."""
    layout = plan_layout(4 * GIB, HOST)
    assert layout.ram == (Range(0, 0xC000_0000), Range(0x1_0000_0000, 0x4000_0000))
    assert layout.mmio32 == Range(0xC000_0000, 0x2000_0000)
    assert layout.ecam == Range(0xE000_0000, 0x10_0000)
    assert (IOAPIC_BASE, LOCAL_APIC_BASE) == (0xFEC0_0000, 0xFEE0_0000)
    assert Range(IO_WINDOW_BASE, IO_WINDOW_SIZE) == Range(0xC000, 0x4000)


def test_a_layout_has_the_reserved_regions_in_order() -> None:
    assert plan_layout(GIB, [HYPERTRANSPORT, MSI, MSI]).reserved == (MSI, HYPERTRANSPORT)
    assert str(MSI) == "0xfee00000-0xfeefffff msi"


def test_the_reserved_region_is_named() -> None:
    direct = Reserved(Range(0x1000, 0x1000), "direct")
    relaxable = Reserved(Range(0x2000, 0x1000), "direct-relaxable")
    first, second = (Reserved(Range(at, 0x1000), "reserved") for at in (0x3000, 0x5000))
    lines = (direct, relaxable, first, second)
    assert find_reserved(Range(0, 0x3000), lines) is None, "firmware's own are translated"
    assert find_reserved(Range(0, 0x3001), lines) is first
    assert find_reserved(Range(0x4000, 0x1000), lines) is None
    assert find_reserved(Range(0x4000, 0x1001), lines) is second
    assert find_reserved(Range(0, 0x10000), lines) is first


@pytest.mark.parametrize(
    "name, at", [("32-bit BAR window", 0xDFFF_F000), ("ECAM", 0xE000_0000), ("ECAM", 0xE00F_F000)]
)
def test_windows_that_cannot_move(name: str, at: int) -> None:
    line = Reserved(Range(at, PAGE), "reserved")
    with pytest.raises(ReservedRange, match=f"the {name} .* falls into this host's reserved range {at:#x}"):
        plan_layout(GIB, (line,))
    plan_layout(GIB, (Reserved(Range(0xE010_0000, PAGE), "reserved"),))


def test_the_smallest_guest() -> None:
    assert plan_layout(MIB).ram == (Range(0, MIB),)
    with pytest.raises(LayoutError, match="0xff000 bytes of RAM: at least 1 MiB, in whole pages of 4096 bytes"):
        plan_layout(MIB - PAGE)
    with pytest.raises(LayoutError, match="in whole pages of 2 MiB"):
        plan_layout(MIB, page=2 * MIB)


def test_holes_that_touch_and_holes_in_holes() -> None:
    """What is left between them starts at whole pages."""
    holes = (
        Reserved(Range(MIB, MIB), "reserved"),
        Reserved(Range(2 * MIB, MIB), "msi"),
        Reserved(Range(2 * MIB + PAGE, PAGE), "reserved"),
        Reserved(Range(4 * MIB + 1, 1), "reserved"),
    )
    ram = plan_layout(8 * MIB, holes).ram
    assert ram == (Range(0, MIB), Range(3 * MIB, MIB), Range(4 * MIB + PAGE, 6 * MIB))
