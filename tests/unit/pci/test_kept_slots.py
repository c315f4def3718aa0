"""KVM keeps a memslot that should go: nothing is done by halves, nothing unmapped, and it can be tried again."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from support.fake_function import PM_AT, Board

from kvmpass.layout import GIB, PAGE, Range
from kvmpass.memory import MemoryRegion, RegionKind


class Keeper:
    """KVM as a listener: deletes as many slots as it is allowed to."""

    def __init__(self) -> None:
        self.regions: list[MemoryRegion] = []
        self.allowed = 100

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None: ...

    def region_added(self, region: MemoryRegion) -> None:
        self.regions.append(region)

    def region_removed(self, region: MemoryRegion) -> None:
        if not self.allowed:
            raise OSError(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION")
        self.allowed -= 1
        self.regions.remove(region)

    def holds(self, region: MemoryRegion) -> bool:
        return region in self.regions


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
def board(keeper: Keeper) -> Iterator[Board]:
    board = Board()
    board.memory.listen(keeper)
    board.config_write(0x04, 0x3, 2)
    assert len(keeper.regions) == 2, "two parts of BAR 0"
    yield board
    keeper.allowed = 100
    board.close()
    assert keeper.regions == []


def shown(keeper: Keeper) -> list[tuple[Range, int]]:
    return sorted((region.range, region.hva) for region in keeper.regions)


WRITES: dict[str, Callable[[Board], None]] = {
    "decoding off": lambda board: board.config_write(0x04, 0, 2),
    "memory off, ports on": lambda board: board.config_write(0x04, 0x1, 2),
    "asleep": lambda board: board.config_write(PM_AT + 4, 3, 2),
    "moved": lambda board: board.config_write(0x14, (board.layout.mmio64.start + 4 * GIB) >> 32),
    "sized": lambda board: board.config_write(0x10, 0xFFFF_FFFF),
}


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_atomic(board: Board, keeper: Keeper, name: str, allowed: int) -> None:
    before = shown(keeper)
    registers = [board.config_read(at) for at in (0x04, 0x10, 0x14, PM_AT + 4)]
    keeper.allowed = allowed
    WRITES[name](board)
    assert shown(keeper) == before
    assert [board.config_read(at) for at in (0x04, 0x10, 0x14, PM_AT + 4)] == registers
    assert board.device.config.memory_enabled, "else KVM_RUN would fail at the next access"
    assert (board.device.config.virtual, board.device.config.power) == (3, 0)
    port = board.config_read(0x18) & ~3
    board.ports.write(port + 4, b"\x77")
    assert board.device.regions[2].data[4] == 0x77, "the ports decode as before, too"
    keeper.allowed = 100
    WRITES[name](board)
    assert shown(keeper) != before


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_bar_that_cannot_be_closed_stays_mapped(board: Board, keeper: Keeper, allowed: int) -> None:
    before = shown(keeper)
    keeper.allowed = allowed
    for _ in range(2):
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
            board.function.close()
        assert shown(keeper) == before
        assert all(region.mapping.view(0, PAGE) for region in keeper.regions)
        keeper.allowed = allowed
    keeper.allowed = 100
    board.function.close()
    assert keeper.regions == []
    board.function.close()


def test_another_function_gets_other_addresses(board: Board, keeper: Keeper) -> None:
    """The range is not free while the guest may still reach pages there."""
    keeper.allowed = 0
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
        board.function.close()
    other = board.make_at(2, type(board.device)())
    mine, theirs = (next(iter(function._bars)) for function in (board.function, other))
    assert not Range(mine.address, mine.size).overlaps(Range(theirs.address, theirs.size))
    keeper.allowed = 100
    board.pci.unplug(other)
    other.close()
