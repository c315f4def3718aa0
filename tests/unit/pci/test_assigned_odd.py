"""An assigned function whose neighbours, device or kernel are unlike the usual."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.assigned_boards import BAR0, BAR2, BAR4, COMMAND, ROM_BAR, made
from support.fake_function import MSI_AT, MSIX_AT, PM_AT, Board, FakeDevice

from kvmpass.layout import PAGE, Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio.device import INTX, MSI, MSIX, ROM


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


# --- writes have no other effects


class Changes:
    """A listener of guest memory that counts."""

    def __init__(self) -> None:
        self.count = 0

    def region_wanted(self, *_: object) -> None: ...

    def region_added(self, _: object) -> None:
        self.count += 1

    def region_removed(self, _: object) -> None:
        self.count += 1


def test_writes_beside_the_power_state_change_no_memslot(board: Board) -> None:
    """Nor do writes of COMMAND and of the state that leave both as they are."""
    board.config_write(COMMAND, 3, 2)
    changes = Changes()
    board.memory.listen(changes)
    changes.count = 0
    for at, value, size in ((PM_AT + 5, 0x03, 1), (PM_AT + 2, 0x03, 2), (PM_AT + 7, 0x03, 1), (COMMAND, 3, 2)):
        board.config_write(at, value, size)
    board.config_write(COMMAND, 0x0407, 2)
    assert board.device.config.data[COMMAND : COMMAND + 2] == b"\x07\x04"
    board.config_write(COMMAND, 0x0002, 2)
    assert changes.count == 0, "ports have no memslots"
    assert len(board.bars()) == 2
    board.memory._listeners.remove(changes)


def test_registers_beside_bars_and_rom_do_not_change_them(board: Board) -> None:
    at = (BAR0, BAR0 + 4, BAR2, BAR4, ROM_BAR)
    before = [board.config_read(offset) for offset in at]
    for offset in (0x0C, 0x28, 0x2C, 0x34, 0x38):
        board.config_write(offset, 0xFFFF_FFFF)
        board.config_write(offset + 3, 0, 1)
    assert [board.config_read(offset) for offset in at] == before


def test_a_device_without_power_management_is_always_in_d0() -> None:
    def change(device: FakeDevice) -> None:
        device.config.data[PM_AT] = 0x09  # a vendor's own instead
        device.config.data[0:4] = b"\xff" * 4

    board = made(change)
    board.config_write(COMMAND, 0x0502, 2)
    assert board.bars() != []
    board.config_write(PM_AT + 4, 3, 2)
    board.config_write(COMMAND + 1, 0x03, 1)
    board.config_write(COMMAND, 0x0302, 2)
    assert board.bars() != []
    board.close()


@pytest.mark.parametrize("kind", [INTX, MSI])
def test_an_interrupt_that_vfio_does_not_disable_ends_no_guest(
    board: Board, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    if kind == MSI:
        board.config_write(MSI_AT + 4, 0xFEE0_0000)
        board.config_write(MSI_AT + 2, 1, 2)
    assert board.device.active == kind

    def refuse(index: int) -> None:
        raise OSError(5, "VFIO_DEVICE_SET_IRQS")

    with monkeypatch.context() as patch:
        patch.setattr(board.device, "disable_irqs", refuse)
        board.config_write(MSI_AT + 2, 1 - (kind == MSI), 2)
        board.config_write(MSIX_AT + 2, 0x8000, 2)
        board.config_write(MSIX_AT + 2, 0, 2)
        board.config_write(MSI_AT + 2, 0, 2)
    assert board.kvm.irqfds == {} == board.kvm.routes
    board.device.active = None
    board.device.signals.clear()


def test_memslots_are_deleted_before_a_device_leaves_d0(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping faults in any state but D0."""
    board.config_write(COMMAND, 2, 2)
    seen: list[tuple[int, int]] = []
    real = board.device.config.write

    def write(offset: int, data: bytes) -> None:
        seen.append((data[0] & 3, len(board.bars())))
        real(offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(board.device.config, "write", write)
        for state in (3, 0, 1, 0):
            board.config_write(PM_AT + 4, state, 2)
    assert [slots for state, slots in seen if state] == [0, 0]


def test_a_device_with_one_kind_of_message_or_none() -> None:
    """Writes anywhere, in any size, to a function that lacks what others have."""
    for missing in ((MSI,), (MSIX,), (MSI, MSIX), (INTX, MSI, MSIX)):

        def change(device: FakeDevice, missing: tuple[int, ...] = missing) -> None:
            for index in missing:
                del device.irqs[index]

        board = made(change)
        for at in range(0, 0x100, 4):
            for size in (1, 2, 4):
                board.config_write(at, board.config_read(at, size), size)
        board.config_write(MSIX_AT + 2, 0x8000, 2)
        without_messages = "INTx" if INTX not in missing else "none"
        assert board.function.interrupt == ("MSI-X" if MSIX not in missing else without_messages)
        board.config_write(MSIX_AT + 2, 0, 2)
        board.config_write(MSI_AT + 4, 0xFEE0_0000)
        board.config_write(MSI_AT + 2, 1, 2)
        assert (board.function.interrupt == "MSI") == (MSI not in missing)
        board.config_write(MSI_AT + 2, 0, 2)
        board.close()


# --- devices unlike the one of these tests


def test_64_bit_bars_in_every_place_that_has_a_next_one() -> None:
    def change(device: FakeDevice) -> None:
        for index in (2, 4):
            device.config.data[BAR0 + 4 * index : BAR0 + 4 * index + 4] = (0xC).to_bytes(4, "little")
            device.regions[index] = device._region(index, PAGE << index, mmap=True)

    board = made(change)
    homes = {}
    for index in (0, 2, 4):
        low, high = board.config_read(BAR0 + 4 * index), board.config_read(BAR0 + 4 * index + 4)
        homes[index] = low & ~0xF | high << 32
        board.config_write(BAR0 + 4 * index + 4, 0xFFFF_FFFF)
        assert board.config_read(BAR0 + 4 * index + 4) == 0xFFFF_FFFF
        board.config_write(BAR0 + 4 * index + 4, high)
        assert board.config_read(BAR0 + 4 * index + 4) == high
    assert all(home >= board.layout.mmio64.start for home in homes.values())
    for index, flags in ((0, 0x4), (2, 0xC), (4, 0xC)):
        low, high = board.config_read(BAR0 + 4 * index), board.config_read(BAR0 + 4 * index + 4)
        assert (low, high) == (homes[index] & 0xFFFF_FFFF | flags, homes[index] >> 32), "untouched by its neighbours"
    board.config_write(COMMAND, 2, 2)
    assert {range_.start for range_ in board.bars()} >= set(homes.values())
    board.close()


def test_the_table_may_be_in_the_last_bar() -> None:
    def change(device: FakeDevice) -> None:
        device.regions[5] = device._region(5, 2 * PAGE)
        device.config.data[MSIX_AT + 4 : MSIX_AT + 8] = (0x800 | 5).to_bytes(4, "little")
        device.config.data[MSIX_AT + 8 : MSIX_AT + 12] = (0x1000 | 5).to_bytes(4, "little")
        device.config.data[MSIX_AT + 12] = 0x77  # another capability's

    board = made(change)
    board.config_write(COMMAND, 2, 2)
    home = board.config_read(0x24) & ~0xF
    assert board.mmio.read(home + 0x800, 16) == bytes(12) + b"\1\0\0\0"
    region = board.device.regions[5]
    region.data[0x7FC:0x800], region.data[0x1000:0x100C] = b"edge", b"bits" * 3
    assert board.mmio.read(home + 0x7FC, 4) == b"edge"
    assert board.mmio.read(home + 0x1000, 8) == bytes(8)
    assert board.mmio.read(home + 0x1008, 4) == b"bits"
    assert board.config_read(MSIX_AT + 12, 1) == 0x77
    board.config_write(MSIX_AT + 12, 0x78, 1)
    assert region is board.device.regions[5] and board.device.config.data[MSIX_AT + 12] == 0x78
    board.close()


def test_a_function_that_is_not_on_a_bus_yet_is_alone(board: Board) -> None:
    """Whatever its own header says of its neighbours on the host."""
    device = FakeDevice()
    assert device.config.data[0x0E] == 0x80
    function = board.make(device)
    assert function.config_read(0x0E, 1) == b"\0"
    function.close()


# --- what KVM does not undo


class Keeping:
    """A listener of guest memory, as KVM where it does not delete memslots; ``keeps``: of which pages."""

    def __init__(self, keeps: Callable[[Range], bool] = lambda range_: True) -> None:
        self.keeps, self.refusing = keeps, True

    def region_wanted(self, *_: object) -> None: ...

    def region_added(self, _: object) -> None: ...

    def region_removed(self, region: MemoryRegion) -> None:
        if self.refusing and self.keeps(region.range):
            raise OSError(12, "KVM_SET_USER_MEMORY_REGION")

    def holds(self, _: object) -> bool:
        return False


def io_first(device: FakeDevice) -> None:
    """Ports in BAR 0, pages in BARs 2 and 4."""
    device.config.data[BAR0 : BAR0 + 8] = (0x1).to_bytes(8, "little")
    device.config.data[BAR2 : BAR2 + 4] = device.config.data[BAR4 : BAR4 + 4] = bytes(4)
    device.regions[0] = device._region(0, 32, memory=False)
    for index in (2, 4):
        device.regions[index] = device._region(index, PAGE, mmap=True)
    del device.irqs[MSIX]


def test_a_write_of_command_is_atomic() -> None:
    """Memory off and ports on, with one memslot that stays: nothing goes on, and what was off already comes back."""
    board = made(io_first)
    board.config_write(COMMAND, 2, 2)
    ports, last = board.config_read(BAR0) & ~3, board.config_read(BAR4)
    before = board.bars()
    assert len(before) == 2
    board.memory.listen(kvm := Keeping(lambda range_: range_.start == last))
    board.config_write(COMMAND, 1, 2)
    assert (board.bars(), board.ports.read(ports, 4)) == (before, b"\xff" * 4)
    assert board.device.config.data[COMMAND] == 2, "the device has not heard of it"
    kvm.refusing = False
    board.config_write(COMMAND, 1, 2)
    assert (board.bars(), board.ports.read(ports, 4)) == ([], bytes(4))
    assert board.device.config.data[COMMAND] == 1
    board.close()


def test_a_device_with_a_memslot_stays_in_d0() -> None:
    board = made(io_first)
    board.config_write(COMMAND, 3, 2)
    before, state = board.bars(), board.config_read(PM_AT + 4, 1)
    board.memory.listen(kvm := Keeping())
    board.config_write(PM_AT + 4, 3, 2)
    assert (board.bars(), board.config_read(PM_AT + 4, 1)) == (before, state)
    kvm.refusing = False
    board.config_write(PM_AT + 4, 3, 2)
    assert (board.bars(), board.config_read(PM_AT + 4, 1) & 3) == ([], 3)
    board.close()


def test_a_bar_that_cannot_move_keeps_its_register(board: Board) -> None:
    board.config_write(COMMAND, 2, 2)
    before, low, high = board.bars(), board.config_read(BAR0), board.config_read(BAR0 + 4)
    board.memory.listen(kvm := Keeping())
    board.config_write(BAR0 + 4, high + 1)
    board.config_write(BAR0, 0xFFFF_FFFF)
    assert (board.bars(), board.config_read(BAR0), board.config_read(BAR0 + 4)) == (before, low, high)
    kvm.refusing = False
    board.config_write(BAR0 + 4, high + 1)
    assert [range_.start for range_ in board.bars()] == [range_.start + (1 << 32) for range_ in before]


def test_a_failed_close_can_be_repeated(board: Board) -> None:
    board.config_write(COMMAND, 2, 2)
    before = board.bars()
    board.memory.listen(kvm := Keeping())
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
        board.function.close()
    assert (board.bars(), board.device.active) == (before, None), "interrupts are off all the same"
    kvm.refusing = False
    board.function.close()
    assert board.bars() == []
    board.function.close()


# --- what was written, and what reads back


@pytest.mark.parametrize("command", [0, 1, 2, 3, 0x0407, 0xFFFF])
def test_a_device_may_be_opened_with_decoding_on(command: int) -> None:
    """VFIO is told by writing it; one that reads as ones is gone."""
    board = made(lambda device: device.config.data.__setitem__(slice(4, 6), command.to_bytes(2, "little")))
    writes = [at for kind, at, _ in board.device.config.accesses if kind == "write"]
    assert COMMAND in writes
    memory, ports = (command != 0xFFFF and bool(command & bit) for bit in (2, 1))
    assert bool(board.bars()) == memory
    assert (board.ports.read(board.config_read(BAR2) & ~3, 4) != b"\xff" * 4) == ports
    board.close()


def test_with_an_unreadable_power_state_nothing_is_decoded(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.config_write(COMMAND, 3, 2)
    ports = board.config_read(BAR2) & ~3

    def refuse(*_: object) -> int:
        raise OSError(5, "EIO")

    with monkeypatch.context() as patch:
        patch.setattr(board.device.config, "read_int", refuse)
        board.config_write(PM_AT + 4, 0, 2)
        assert (board.bars(), board.ports.read(ports, 4)) == ([], b"\xff" * 4)
    board.config_write(PM_AT + 4, 0, 2)
    assert board.bars() != []


def test_a_device_that_vfio_does_not_write_decodes_nothing() -> None:
    """It comes with decoding on, but VFIO does not know of it: its pages would fault."""
    writable = False
    device = FakeDevice()
    real = device.config.write

    def write(offset: int, data: bytes) -> None:
        if not writable:
            raise OSError(5, "pwrite")
        real(offset, data)

    device.config.data[COMMAND] = 3
    device.config.write = write  # type: ignore[method-assign]
    board = Board(device)
    ports = board.config_read(BAR2) & ~3
    assert (board.bars(), board.ports.read(ports, 4)) == ([], b"\xff" * 4)
    writable = True
    board.config_write(COMMAND, 3, 2)
    assert (len(board.bars()), board.ports.read(ports, 4)) == (2, bytes(4))
    board.close()


def test_an_enabled_rom_follows_memory_decoding(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own bit is set once; COMMAND and the power state turn it off and on."""
    home = board.config_read(ROM_BAR)
    board.config_write(ROM_BAR, home | 1)
    read = board.device.regions[ROM].read
    reads: list[int] = []

    def counted(offset: int, size: int) -> bytes:
        reads.append(offset)
        return read(offset, size)

    monkeypatch.setattr(board.device.regions[ROM], "read", counted)
    for at, value, on in ((COMMAND, 2, True), (COMMAND, 0, False), (COMMAND, 2, True), (PM_AT + 4, 3, False)):
        board.config_write(at, value, 2)
        reads.clear()
        assert (board.mmio.read(home, 2), reads) == ((b"\x55\xaa", [0]) if on else (b"\xff\xff", []))
