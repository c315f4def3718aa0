"""Guest addresses for BARs: what is handed out, what a guest may choose, who waits for whom."""

from __future__ import annotations

import random

import pytest

from kvmpass.errors import LayoutError
from kvmpass.layout import GIB, MIB, PAGE, Layout, Range, plan_layout
from kvmpass.pci import BarSpace
from kvmpass.pci.barspace import IO_WINDOW, BarKind

KINDS = list(BarKind)


@pytest.fixture
def layout() -> Layout:
    return plan_layout(GIB)


@pytest.fixture
def space(layout: Layout) -> BarSpace:
    return BarSpace(layout)


def windows(layout: Layout) -> dict[BarKind, Range]:
    return {BarKind.IO: IO_WINDOW, BarKind.MEMORY32: layout.mmio32, BarKind.MEMORY64: layout.mmio64}


def test_the_window_for_ports_is_a_pcs() -> None:
    assert Range(0xC000, 0x4000) == IO_WINDOW


def test_the_first_of_each_kind_is_where_its_window_begins(space: BarSpace, layout: Layout) -> None:
    for kind, window in windows(layout).items():
        assert space.allocate(kind, PAGE) == Range(window.start, PAGE)


def test_first_fit_between_allocated_ranges(space: BarSpace) -> None:
    taken = [space.allocate(BarKind.IO, 32) for _ in range(4)]
    assert [range_.start for range_ in taken] == [0xC000, 0xC020, 0xC040, 0xC060]
    space.free(BarKind.IO, taken[1])
    assert space.allocate(BarKind.IO, 64).start == 0xC080, "the gap is too small"
    assert space.allocate(BarKind.IO, 16).start == 0xC020
    assert space.allocate(BarKind.IO, 16).start == 0xC030, "wholly filled"
    assert space.allocate(BarKind.IO, 4).start == 0xC0C0


def test_a_gap_is_used_only_where_it_is_aligned(space: BarSpace) -> None:
    space.allocate(BarKind.IO, 16)
    assert space.allocate(BarKind.IO, 256).start == 0xC100
    assert space.allocate(BarKind.IO, 128).start == 0xC080
    assert space.allocate(BarKind.IO, 64).start == 0xC040


def test_memory_never_shares_a_page_and_ports_do(space: BarSpace) -> None:
    for kind in (BarKind.MEMORY32, BarKind.MEMORY64):
        first, second = space.allocate(kind, 16), space.allocate(kind, 16)
        assert (first.size, second.size, second.start - first.start) == (PAGE, PAGE, PAGE)
    assert space.allocate(BarKind.IO, 4) == Range(0xC000, 4)
    assert space.allocate(BarKind.IO, 4) == Range(0xC004, 4)


def test_a_full_window_is_refused_and_holds_up_to_its_last_byte(space: BarSpace, layout: Layout) -> None:
    for _ in range(4):
        last = space.allocate(BarKind.IO, 0x1000)
    assert last.end == IO_WINDOW.end
    with pytest.raises(LayoutError, match=r"no room for a io BAR of 0x4 bytes in 0xc000-0xffff"):
        space.allocate(BarKind.IO, 4)
    space.free(BarKind.IO, last)
    assert space.allocate(BarKind.IO, 0x1000) == last
    assert space.allocate(BarKind.MEMORY32, layout.mmio32.size) == layout.mmio32
    with pytest.raises(LayoutError, match="no room for a 32-bit memory BAR"):
        space.allocate(BarKind.MEMORY32, PAGE)
    with pytest.raises(LayoutError, match="no room for a 64-bit memory BAR"):
        space.allocate(BarKind.MEMORY64, 1 << 40)


def test_kinds_have_their_own_windows(space: BarSpace) -> None:
    """A range of one kind is neither taken from nor given back to another."""
    space.allocate(BarKind.MEMORY32, PAGE)
    wide = space.allocate(BarKind.MEMORY64, PAGE)
    with pytest.raises(ValueError):
        space.free(BarKind.MEMORY32, wide)
    space.free(BarKind.MEMORY64, wide)
    assert space.allocate(BarKind.MEMORY64, PAGE) == wide


def test_random_allocations_stay_apart_aligned_and_inside(space: BarSpace, layout: Layout) -> None:
    rng, held = random.Random(3), []
    for _ in range(600):
        if held and rng.random() < 0.4:
            space.free(*held.pop(rng.randrange(len(held))))
            continue
        kind = rng.choice(KINDS)
        size = 1 << rng.randrange(2, 10 if kind is BarKind.IO else 24)
        try:
            range_ = space.allocate(kind, size)
        except LayoutError:
            continue
        assert windows(layout)[kind].contains(range_) and range_.start % range_.size == 0 and range_.size >= size
        assert not [one for other, one in held if other is kind and one.overlaps(range_)]
        held.append((kind, range_))
    assert len(held) > 50


@pytest.mark.parametrize("size", [4, PAGE, MIB])
def test_a_guest_may_use_its_windows_to_the_last_byte(space: BarSpace, layout: Layout, size: int) -> None:
    for kind in KINDS:
        for window in [IO_WINDOW] if kind is BarKind.IO else [layout.mmio32, layout.mmio64]:
            if size > window.size:
                continue
            for start in (window.start, window.end - size):
                assert space.allows(kind, Range(start, size)), (kind, hex(start))
            for start in (window.start - 1, window.start - size, window.end - size + 1, window.end):
                assert not space.allows(kind, Range(start, size)), (kind, hex(start))


def test_ports_are_no_memory(space: BarSpace, layout: Layout) -> None:
    assert not space.allows(BarKind.MEMORY32, Range(0xC000, 16))
    assert not space.allows(BarKind.MEMORY64, Range(0xC000, 16))
    assert not space.allows(BarKind.IO, Range(layout.mmio32.start, 16))


def test_a_bar_cannot_overlap_ram_or_chips(space: BarSpace, layout: Layout) -> None:
    for start in (0, MIB, layout.ecam.start, 0xFEC0_0000, 0xFEE0_0000):
        for kind in KINDS:
            assert not space.allows(kind, Range(start, PAGE)), (kind, hex(start))


class Waiting:
    """Tries again, and waits on while it does not get what it wants."""

    def __init__(self, name: str, space: BarSpace, log: list[str], stubborn: bool = False) -> None:
        self.name, self.space, self.log, self.stubborn = name, space, log, stubborn

    def retry(self) -> None:
        self.log.append(self.name)
        if self.stubborn:
            self.space.wait(self)


def test_waiting_decoders_are_retried_once_in_order(space: BarSpace) -> None:
    log: list[str] = []
    first, second, gone = (Waiting(name, space, log) for name in ("first", "second", "gone"))
    for decoder in (first, gone, second, first):
        space.wait(decoder)
    space.forget(gone)
    space.forget(gone)
    space.released()
    assert log == ["first", "second"]
    space.released()
    assert log == ["first", "second"], "they do not wait any more"


def test_a_decoder_that_fails_again_waits_on(space: BarSpace) -> None:
    log: list[str] = []
    space.wait(Waiting("stubborn", space, log, stubborn=True))
    for _ in range(3):
        space.released()
    assert log == ["stubborn"] * 3
