"""An assigned function whose BARs other devices reach: it decodes nothing while the device does not respond there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.assigned_boards import BAR0, COMMAND
from support.config_spaces import NVME
from support.fake_function import EXPRESS_AT, PM_AT, Board, FakeDevice

from kvmpass.layout import PAGE, Range
from kvmpass.memory import MemoryRegion

FLR = EXPRESS_AT + 8
ADVANCED_AT = 0x80  # of a device with Advanced Features


class Peers:
    """The domain: a listener of guest memory, in which every BAR is mapped; ``log`` has what it maps and unmaps."""

    def __init__(self, board: Board) -> None:
        self.refusing = False
        self.log: list[tuple[str, Range]] = []
        self.mapped: list[MemoryRegion] = []
        self.silences = 0
        board.memory.listen(self)
        board.device.config.before_silence = self.check

    def check(self) -> None:
        self.silences += 1
        assert self.mapped == []

    def region_wanted(self, *_: object) -> None: ...

    def region_added(self, region: MemoryRegion) -> None:
        self.mapped.append(region)
        self.log.append(("map", region.range))

    def region_removed(self, region: MemoryRegion) -> None:
        if self.refusing:
            raise OSError("the IOMMU keeps it")
        self.mapped.remove(region)
        self.log.append(("unmap", region.range))

    def holds(self, region: MemoryRegion) -> bool:
        return region in self.mapped


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board(p2p=True)
    board.config_write(COMMAND, 2, 2)
    yield board
    board.config_write(COMMAND, 0, 2)
    board.close()


@pytest.fixture
def peers(board: Board) -> Iterator[Peers]:
    peers = Peers(board)
    assert len(peers.mapped) == 2, "around the page with the MSI-X table"
    yield peers
    peers.refusing = False


def once(ranges: list[Range]) -> list[tuple[str, Range]]:
    """Each is unmapped and mapped, by one call."""
    return sorted([("map", range_) for range_ in ranges] + [("unmap", range_) for range_ in ranges])


@pytest.mark.parametrize(
    "at, value, size",
    [(FLR, 0x8000, 2), (FLR + 1, 0x80, 1), (FLR, 0x0000_A810, 4)],
    ids=["word", "byte", "with the status"],
)
def test_a_reset_by_the_guest(board: Board, peers: Peers, at: int, value: int, size: int) -> None:
    before = board.bars()
    peers.log.clear()
    board.config_write(at, value, size)
    assert (board.device.config.resets, peers.silences) == (1, 1)
    assert board.bars() == before
    assert sorted(peers.log) == once(before)


def test_other_writes_beside_the_reset_bit(board: Board, peers: Peers) -> None:
    peers.log.clear()
    for at, value, size in ((FLR, 0x7FFF, 2), (FLR + 1, 0x7F, 1), (FLR + 2, 0x80, 1), (FLR, 0x80, 1)):
        board.config_write(at, value, size)
    assert (board.device.config.resets, peers.log) == (0, [])


@pytest.mark.parametrize("at, value", [(COMMAND, 0), (PM_AT + 4, 3), (BAR0, 0xFFFF_FFFF)])
def test_what_else_ends_it(board: Board, peers: Peers, at: int, value: int) -> None:
    board.config_write(at, value, 4)
    assert peers.mapped == []


def test_a_bar_that_moves_takes_its_mappings_along(board: Board, peers: Peers) -> None:
    peers.log.clear()
    old = board.bars()
    board.config_write(BAR0, board.config_read(BAR0) + 16 * PAGE)
    new = [Range(range_.start + 16 * PAGE, range_.size) for range_ in old]
    assert [region.range for region in peers.mapped] == board.bars() == new
    assert sorted(peers.log) == sorted([("map", range_) for range_ in new] + [("unmap", range_) for range_ in old])


def test_a_reset_that_would_meet_a_mapping_is_not_done(board: Board, peers: Peers) -> None:
    """The guest writes in vain, and sees everything as before."""
    before = board.bars()
    peers.refusing = True
    for at, value, size in ((FLR, 0x8000, 2), (COMMAND, 0, 2), (PM_AT + 4, 3, 1)):
        board.config_write(at, value, size)
        assert (board.device.config.resets, board.device.config.power) == (0, 0)
        assert board.config_read(COMMAND, 2) & 2
        assert (board.bars(), [region.range for region in peers.mapped]) == (before, before)
    with pytest.raises(OSError, match="keeps it"):
        board.function.suspend()
    assert board.bars() == before


def test_a_reset_by_advanced_features() -> None:
    """A conventional device's; the same bit of its neighbour resets nothing."""
    space = bytearray(NVME)
    space[0x34], space[ADVANCED_AT : ADVANCED_AT + 6] = ADVANCED_AT, bytes((0x13, 0, 6, 3, 0, 0))
    space[COMMAND] = 2
    device = FakeDevice(bytes(space))
    board = Board(device, p2p=True)
    peers = Peers(board)
    count = len(peers.mapped)
    assert count
    peers.log.clear()
    board.config_write(ADVANCED_AT + 4, 0xFE, 1)
    assert peers.log == []
    board.config_write(ADVANCED_AT + 4, 1, 1)
    assert [what for what, _ in peers.log] == ["unmap"] * count + ["map"] * count
    board.close()


def test_without_peers_a_reset_changes_no_memslot() -> None:
    board = Board()
    board.config_write(COMMAND, 2, 2)
    peers = Peers(board)
    board.device.config.before_silence = lambda: None
    peers.log.clear()
    board.config_write(FLR, 0x8000, 2)
    assert (board.device.config.resets, peers.log) == (1, [])
    board.close()


# --- resets by the host


def test_a_suspended_function_decodes_nothing(board: Board, peers: Peers) -> None:
    """Whatever the guest writes meanwhile, no ports either; afterwards it decodes what the registers say then."""
    before = board.bars()
    board.config_write(COMMAND, 3, 2)
    board.function.suspend()
    assert board.function._bars.decoding == 0
    for at, value, size in ((COMMAND, 2, 2), (PM_AT + 4, 0, 1), (FLR, 0x8000, 2), (BAR0, 0xFFFF_FFFF, 4)):
        board.config_write(at, value, size)
        assert (board.bars(), peers.mapped) == ([], [])
    board.config_write(BAR0, before[0].start & 0xFFFF_FFFF | 4)
    board.device.config.reset()
    board.function.resume()
    assert board.bars() == before
    board.function.suspend()
    board.config_write(COMMAND, 0, 2)
    board.function.resume()
    assert board.bars() == []


def test_a_closed_function_is_not_resumed(board: Board, peers: Peers) -> None:
    """The guest may eject it during the reset, and not all of it may go."""
    board.function.suspend()
    board.function.close()
    board.function.resume()
    assert (board.bars(), peers.mapped) == ([], [])
