"""An assigned function in the guest's configuration space: which registers are whose, and what a write sets off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from support.assigned_boards import BAR0, BAR2, BAR4, COMMAND, ROM_BAR, made
from support.fake_function import (
    EXPRESS_AT,
    GSIS,
    MSI_AT,
    MSIX_AT,
    PENDING_AT,
    PM_AT,
    TABLE_AT,
    VECTORS,
    Board,
    FakeDevice,
)

from kvmpass.layout import PAGE, Range
from kvmpass.pciregs import capabilities
from kvmpass.vfio.device import CONFIG, INTX, MSI, MSIX, ROM


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def test_the_fast_path_reads_everything_but_the_pending_bits_of_msi() -> None:
    """These are the count of an eventfd. The file is the device's, where its configuration space is."""

    def place(device: FakeDevice) -> None:
        device.fd = 1000
        device.config.info = dataclasses.replace(device.config.info, offset=7 << 40)

    board = made(place)
    registers = board.function.config_image()
    assert (registers.fd, registers.offset) == (1000, 7 << 40)
    assert registers.exits == Range(MSI_AT + 0x14, 4)
    assert registers.values[0x0E] == 0, "one function"
    board.function.set_multifunction(True)
    assert registers.values[0x0E] == 0x80
    board.config_write(BAR0, 0xD000_0000, 4)
    assert registers.values[BAR0 : BAR0 + 4] == (0xD000_0004).to_bytes(4, "little")
    assert board.function.config_image() is registers
    board.close()


def test_what_is_read_of_a_device() -> None:
    """An assignment waits for each access. A capability is one; without decoding the power state does not matter."""
    seen: list[int] = []

    def count(device: FakeDevice) -> None:
        read = device.config.read_int
        device.config.read_int = lambda offset, size=4: (seen.append(offset), read(offset, size))[1]  # type: ignore

    board = made(count)
    assert PM_AT + 4 not in seen
    assert (len(seen), len({*seen})) == (23, 22), "message control of MSI gives its size, too"
    board.close()


def test_without_pending_bits_nothing_of_it_exits() -> None:
    board = made(without(MSI))
    assert board.function.config_image().exits.size == 0
    board.close()


# --- the header


@pytest.mark.parametrize("pin", [1, 2, 3, 4])
def test_a_pin_is_one_of_the_boards_four_lines(pin: int) -> None:
    board = made(lambda device: device.config.data.__setitem__(0x3D, pin))
    assert board.config_read(0x3D, 1) == pin
    assert list(board.kvm.pins.values()) == [GSIS[pin - 1]]
    assert board.function.interrupt == "INTx"
    board.close()


def without(index: int) -> Callable[[FakeDevice], None]:
    return lambda device: device.irqs.pop(index)


def none_of(index: int) -> Callable[[FakeDevice], None]:
    def change(device: FakeDevice) -> None:
        device.irqs[index] = dataclasses.replace(device.irqs[index], count=0)

    return change


def pin(value: int) -> Callable[[FakeDevice], None]:
    return lambda device: device.config.data.__setitem__(0x3D, value)


@pytest.mark.parametrize("change", [pin(0), pin(5), pin(0xFF), without(INTX), none_of(INTX)])
def test_a_pin_without_vfio_interrupts_reads_as_none(change: Callable[[FakeDevice], None]) -> None:
    board = made(change)
    assert board.config_read(0x3D, 1) == 0
    assert (board.function.interrupt, board.kvm.pins, board.device.active) == ("none", {}, None)
    board.config_write(MSIX_AT + 2, 0x8000, 2)
    assert board.function.interrupt == "MSI-X"
    board.config_write(MSIX_AT + 2, 0, 2)
    assert (board.function.interrupt, board.kvm.pins) == ("none", {})
    board.close()


@pytest.mark.parametrize("change", [without, none_of])
def test_a_capability_without_its_interrupts_is_hidden(change: Callable[[int], Callable[[FakeDevice], None]]) -> None:
    for index, at, other in ((MSI, MSI_AT, MSIX_AT), (MSIX, MSIX_AT, MSI_AT)):
        board = made(change(index))
        offsets = [capability.offset for capability in capabilities(board.config_read)]
        assert at not in offsets and other in offsets
        board.config_write(at + 2, 0xFFFF, 2)
        assert (board.config_read(at + 2, 2), board.function.interrupt) == (0, "INTx")
        board.close()


def test_without_msix_the_whole_bar_is_mapped() -> None:
    board = made(without(MSIX))
    board.config_write(COMMAND, 2, 2)
    assert board.bars() == [Range(board.layout.mmio64.start, 4 * PAGE)]
    board.close()


def test_the_interrupt_line_is_the_guests_to_write(board: Board) -> None:
    """Firmware would put an interrupt there; 255 says that none has."""
    assert board.config_read(0x3C, 1) == 0xFF
    board.config_write(0x3C, 0x0005, 2)
    assert board.config_read(0x3C, 2) == 0x0105, "the pin is read-only"
    assert board.device.config.data[0x3C] == 0, "the device's own stays the host's"


def test_the_multifunction_bit_is_set_by_the_bus(board: Board) -> None:
    assert board.config_read(0x0E, 1) == 0x00
    board.function.set_multifunction(True)
    assert board.config_read(0x0E, 1) == 0x80
    board.config_write(0x0E, 0x00, 1)
    assert board.config_read(0x0E, 1) == 0x80
    board.function.set_multifunction(False)
    assert board.config_read(0x0E, 1) == 0x00


def test_identity_is_the_devices(board: Board) -> None:
    assert board.config_read(0) == 0x65871234
    board.device.config.data[0x40 - 0x10] = 0
    assert board.config_read(0x2C) == int.from_bytes(board.device.config.data[0x2C:0x30], "little")


# --- BARs


def test_absent_bars_read_as_zero(board: Board) -> None:
    for at in (0x1C, 0x24):
        board.config_write(at, 0xFFFF_FFFF)
        assert board.config_read(at) == 0, hex(at)


def test_a_bar_is_written_byte_by_byte(board: Board) -> None:
    home = board.config_read(BAR4)
    for at, byte in enumerate((home + 0x10_0000).to_bytes(4, "little")):
        board.config_write(BAR4 + at, byte, 1)
    assert board.config_read(BAR4) == home + 0x10_0000
    board.config_write(BAR4 + 2, home >> 16, 2)
    assert board.config_read(BAR4) == home
    board.config_write(BAR0 + 4 + 1, 0x12, 1)
    assert board.config_read(BAR0 + 4) >> 8 & 0xFF == 0x12
    before = board.config_read(ROM_BAR)
    board.config_write(ROM_BAR + 3, 0xC1, 1)
    assert board.config_read(ROM_BAR) == before & 0x00FF_FFFF | 0xC100_0000


def test_each_bar_decodes_by_its_own_command_bit(board: Board) -> None:
    io, memory = board.config_read(BAR2) & ~3, board.config_read(BAR4)
    for command, ports, mmio in ((0, False, False), (1, True, False), (2, False, True), (3, True, True)):
        board.config_write(COMMAND, command, 2)
        assert (board.ports.read(io, 4) != b"\xff" * 4) == ports
        assert (board.mmio.read(memory, 4) != b"\xff" * 4) == mmio
        assert bool(board.bars()) == mmio


def test_the_upper_half_belongs_to_the_bar_below(board: Board) -> None:
    board.config_write(COMMAND, 2, 2)
    home = board.bars()[0].start
    board.config_write(BAR0 + 4, (home >> 32) + 1)
    assert board.bars()[0].start == home + (1 << 32)
    assert board.config_read(BAR0 + 4) == (home >> 32) + 1
    assert board.config_read(BAR0) == home & 0xFFFF_FFFF | 4


def test_a_64_bit_bar_in_the_last_register_has_no_upper_half() -> None:
    """Such a device is broken: nothing behind its BARs may change for it."""

    def change(device: FakeDevice) -> None:
        device.config.data[0x24:0x28] = (0x4).to_bytes(4, "little")
        device.regions[5] = device._region(5, PAGE)

    board = made(change)
    board.config_write(0x24, 0xFFFF_FFFF)
    board.config_write(0x28, 0xFFFF_FFFF)
    assert board.device.config.data[0x28:0x2C] == b"\xff" * 4, "that is another register"
    assert board.config_read(0x24) == 0xFFFF_F004
    board.close()


def test_a_device_without_a_rom() -> None:
    board = made(lambda device: device.regions.pop(ROM))
    board.config_write(ROM_BAR, 0xFFFF_FFFF)
    assert board.config_read(ROM_BAR) == 0
    board.config_write(COMMAND, 2, 2)
    board.close()


def test_a_rom_needs_memory_decoding_and_its_own_bit(board: Board) -> None:
    home = board.config_read(ROM_BAR)
    for command, enable in ((0, 0), (0, 1), (2, 0), (2, 1)):
        board.config_write(COMMAND, command, 2)
        board.config_write(ROM_BAR, home | enable)
        assert (board.mmio.read(home, 2) == b"\x55\xaa") == (command == 2 and enable == 1)
        assert board.config_read(ROM_BAR) == home | enable


# --- MSI-X in configuration space


def test_two_bits_of_message_control_are_writable(board: Board) -> None:
    """The table's size and place are ours to say."""
    size, table, pending = (board.config_read(MSIX_AT + at, n) for at, n in ((2, 2), (4, 4), (8, 4)))
    assert (size, table, pending) == (VECTORS - 1, TABLE_AT, PENDING_AT)
    for at in (2, 4, 8):
        board.config_write(MSIX_AT + at, 0xFFFF_FFFF if at > 2 else 0x7FFF, 4 if at > 2 else 2)
    assert board.config_read(MSIX_AT + 2, 2) == 0x4000 | VECTORS - 1
    assert (board.config_read(MSIX_AT + 4), board.config_read(MSIX_AT + 8)) == (TABLE_AT, PENDING_AT)
    assert board.device.active == INTX


def test_enable_bits_of_the_device_are_hidden() -> None:
    """What a host's driver has left there."""

    def change(device: FakeDevice) -> None:
        device.config.data[MSIX_AT + 3] |= 0xC0

    board = made(change)
    assert board.config_read(MSIX_AT + 2, 2) == VECTORS - 1
    assert (board.function.interrupt, board.device.active) == ("INTx", INTX)
    board.close()


@pytest.mark.parametrize("at, size, value", [(2, 2, 0x8000), (3, 1, 0x80), (0, 4, 0x8000_0000)])
def test_any_write_of_the_enable_bit_takes_effect(board: Board, at: int, size: int, value: int) -> None:
    board.config_write(MSIX_AT + at, value, size)
    assert (board.function.interrupt, board.device.active, board.kvm.pins) == ("MSI-X", MSIX, {})
    board.config_write(MSIX_AT + 3, 0, 1)
    assert (board.function.interrupt, board.device.active) == ("INTx", INTX)


def test_writes_beside_the_enable_bit_have_no_effect(board: Board) -> None:
    board.config_write(MSIX_AT + 2, 0xFF, 1)
    board.config_write(MSIX_AT + 4, 0x8000_8000)
    assert board.function.interrupt == "INTx"


@pytest.mark.parametrize("bar", [0, 2, 4])
def test_table_and_pending_bits_trap_in_the_bar_that_holds_them(bar: int) -> None:
    """Which need not be the same, nor BAR 0."""

    def change(device: FakeDevice) -> None:
        device.config.data[MSIX_AT + 4 : MSIX_AT + 8] = (0 | 4).to_bytes(4, "little")
        device.config.data[MSIX_AT + 8 : MSIX_AT + 12] = (0x10 | bar).to_bytes(4, "little")

    board = made(change)
    board.config_write(COMMAND, 3, 2)
    table = board.config_read(BAR4) & ~0xF
    if bar != 4:
        assert board.mmio.read(table + 16, 16) == bytes(12) + b"\1\0\0\0"
        board.mmio.write(table, b"here")
        assert board.mmio.read(table, 4) == b"here"
        assert board.device.regions[4].data[:4] == bytes(4)
    home = board.config_read(BAR0 + 4 * bar) & ~0xF | (board.config_read(BAR0 + 4) << 32 if bar == 0 else 0)
    bus = board.ports if bar == 2 else board.mmio
    bus.write(home + 0x10, b"\xff" * 4)
    assert board.device.regions[bar].data[0x10:0x14] == bytes(4), "pending bits are never the device's"
    board.close()


# --- which kind of interrupt is on


def test_messages_and_the_pin_are_exclusive(board: Board) -> None:
    """MSI-X before MSI before the pin, as the guest's bits say."""
    seen = []
    for msi, msix in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 1), (1, 1), (1, 0), (0, 0)):
        board.config_write(MSI_AT + 4, 0xFEE0_0000)
        board.config_write(MSI_AT + 2, msi, 2)
        board.config_write(MSIX_AT + 2, 0x8000 * msix, 2)
        seen.append(board.function.interrupt)
        assert board.device.active == {"INTx": INTX, "MSI": MSI, "MSI-X": MSIX}[board.function.interrupt]
        assert bool(board.kvm.pins) == (seen[-1] == "INTx")
        assert bool(board.kvm.routes) == (seen[-1] == "MSI")
    assert seen == ["INTx", "MSI", "MSI-X", "MSI-X", "INTx", "MSI-X", "MSI-X", "MSI", "INTx"]


# --- what the device itself keeps


def test_registers_of_shown_capabilities_reach_the_device(board: Board) -> None:
    board.config_write(EXPRESS_AT + 8, 0x2810, 2)
    assert board.device.config.data[EXPRESS_AT + 8 : EXPRESS_AT + 10] == b"\x10\x28"
    board.config_write(PM_AT + 4, 0x8000, 2)
    assert board.device.config.data[PM_AT + 5] == 0x80
    board.config_write(COMMAND, 0x0407, 2)
    assert board.device.config.data[COMMAND : COMMAND + 2] == b"\x07\x04"


def test_the_upper_byte_of_command_alone_decodes_nothing(board: Board) -> None:
    board.config_write(COMMAND + 1, 0xFF, 1)
    assert board.bars() == []
    board.config_write(COMMAND, 0x02, 1)
    assert board.bars() != []
    board.config_write(COMMAND + 1, 0, 1)
    assert board.bars() != []
    board.config_write(COMMAND, 0x00, 1)
    assert board.bars() == []


def test_status_is_the_devices(board: Board) -> None:
    board.config_write(COMMAND, 0xFFFF_0002)
    assert board.device.config.data[0x06:0x08] == b"\xff\xff"
    assert board.bars() != []


def test_a_device_that_vfio_does_not_read(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unplugged from the host, for one: no exception, no memslots, no decoding."""
    board.config_write(COMMAND, 2, 2)

    def refuse(*_: object) -> bytes:
        raise OSError(5, "EIO")

    with monkeypatch.context() as patch:
        for name in ("read", "write", "read_int"):
            patch.setattr(board.device.regions[CONFIG], name, refuse)
        assert board.config_read(0) == 0xFFFF_FFFF
        board.config_write(COMMAND, 0, 2)
        assert board.bars() == []


def test_closing_a_function_in_use(board: Board) -> None:
    """Interrupts off, memslots gone, mappings closed: Board.close looks."""
    board.config_write(COMMAND, 3, 2)
    board.config_write(MSIX_AT + 2, 0x8000, 2)
    table = board.layout.mmio64.start + TABLE_AT
    board.mmio.write(table, (0xFEE0_0000).to_bytes(8, "little"))
    board.mmio.write(table + 8, bytes(8))
    assert board.kvm.irqfds and board.bars()
    board.function.close()
    assert (board.kvm.irqfds, board.bars(), board.device.active) == ({}, [], None)


def test_zero_vectors_hide_the_capability() -> None:
    """A function of MSI-X with one vector, the least there is."""

    def change(device: FakeDevice) -> None:
        device.irqs[MSIX] = dataclasses.replace(device.irqs[MSIX], count=1)
        device.config.data[MSIX_AT + 2 : MSIX_AT + 4] = bytes(2)

    board = made(change)
    board.config_write(COMMAND, 2, 2)
    board.config_write(MSIX_AT + 2, 0x8000, 2)
    table = board.layout.mmio64.start + TABLE_AT
    assert board.mmio.read(table, 16) == bytes(12) + b"\1\0\0\0"
    assert board.mmio.read(table + 16, 4) == bytes(4), "behind it is the device's"
    board.close()


def test_two_functions_have_separate_addresses(board: Board) -> None:
    """A second function finds room beside the first, in all three windows."""
    other = board.make_at(2, FakeDevice())

    def homes(slot: int) -> list[int]:
        return [int.from_bytes(board.pci.read(0, slot << 3, at, 4), "little") for at in (BAR0, BAR2, BAR4, ROM_BAR)]

    assert all(one != two for one, two in zip(homes(1), homes(2), strict=True))
    board.pci.unplug(other)
    other.close()
