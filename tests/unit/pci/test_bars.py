"""The BARs of one function: where their registers are, and that they decode together or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fake_bar import IO, MEMORY32, MEMORY64, GuestSpace, Region

from kvmpass.layout import PAGE, Range
from kvmpass.pci.bars import Bars
from kvmpass.pci.configspace import ConfigSpace
from kvmpass.pciregs import BAR0, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, ROM

BAR2, BAR4, BAR5, BEHIND = BAR0 + 8, BAR0 + 16, BAR0 + 20, BAR0 + 24


class Function:
    """Nothing but BARs: 64-bit memory in 0, ports in 2, memory in 4, a ROM."""

    def __init__(self) -> None:
        self.guest = guest = GuestSpace()
        self.space = ConfigSpace()
        self.bars = Bars(self.space)
        self.regions = [Region(PAGE, [Range(0, PAGE)]), Region(16), Region(PAGE, [Range(0, PAGE)]), Region(PAGE)]
        wide, ports, memory, rom = self.regions
        self.bars.add(BAR0, guest.bar(wide, MEMORY64))
        self.bars.add(BAR2, guest.bar(ports, IO))
        self.bars.add(BAR4, guest.bar(memory, MEMORY32))
        self.bars.add(ROM, guest.rom(rom))

    def read(self, at: int) -> int:
        return int.from_bytes(self.space.read(at, 4), "little")

    def write(self, at: int, value: int, size: int = 4) -> bool:
        return self.bars.write(at, value.to_bytes(size, "little"))

    @property
    def decoded(self) -> list[bool]:
        return [bar._connected for bar in self.bars]


@pytest.fixture
def function() -> Iterator[Function]:
    function = Function()
    yield function
    function.bars.close()
    function.bars.close()
    function.guest.close()


def test_each_has_its_register(function: Function) -> None:
    wide, ports, memory, rom = function.bars
    assert [function.read(at) for at in (BAR0, BAR2, BAR4, ROM)] == [
        wide.address & 0xFFFF_FFFF | MEMORY64,
        ports.address | IO,
        memory.address | MEMORY32,
        rom.address,
    ]
    assert function.read(BAR0 + 4) == wide.address >> 32 != 0
    assert [function.read(at) for at in (BAR2 + 4, BAR5)] == [0, 0]
    assert function.bars.decoding == 0


def test_writes_outside_of_bar_registers_are_not_handled(function: Function) -> None:
    for at in (0x04, BAR0 - 4, BAR2 + 4, BAR5, BEHIND, ROM + 4):
        assert not function.write(at, 0xFFFF_FFFF), hex(at)
    function.bars.add(BAR5, function.guest.bar(Region(PAGE), MEMORY64))
    assert function.write(BAR5, 0)
    assert not function.write(BEHIND, 0), "the upper half would be there"


def test_registers_are_written_in_pieces(function: Function) -> None:
    memory = list(function.bars)[2]
    before = memory.address
    assert function.write(BAR4 + 2, 0xD123, 2)
    assert function.read(BAR4) == memory.address == before & 0xFFFF | 0xD123 << 16
    assert function.write(BAR4 + 1, 0x50, 1)
    assert function.read(BAR4) == memory.address == 0xD123_5000
    assert function.write(BAR0 + 4, 0x12)
    assert function.read(BAR0 + 4) == 0x12


def test_they_decode_by_their_kind(function: Function) -> None:
    for command, decoded in (
        (COMMAND_MASTER, [False, False, False, False]),
        (COMMAND_IO, [False, True, False, False]),
        (COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER, [True, True, True, False]),
        (COMMAND_MEMORY, [True, False, True, False]),
    ):
        function.bars.decode(command)
        assert (function.decoded, function.bars.decoding) == (decoded, command & 3)


def test_a_rom_has_its_own_enable_bit_too(function: Function) -> None:
    function.write(ROM, function.read(ROM) | 1)
    assert function.decoded[3] is False
    function.bars.decode(COMMAND_MEMORY)
    assert function.decoded[3] is True
    function.write(ROM, function.read(ROM) & ~1)
    assert function.decoded[3] is False
    function.write(ROM, function.read(ROM) | 1)
    assert function.decoded[3] is True


def test_where_kvm_keeps_a_memslot_all_decode_as_before(function: Function) -> None:
    function.bars.decode(COMMAND_IO | COMMAND_MEMORY)
    last = list(function.bars)[2]
    function.guest.kvm.refusing, function.guest.kvm.which = "removed", lambda address: address == last.address
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
        function.bars.decode(0)
    assert (function.decoded, function.bars.decoding) == ([True, True, True, False], 3)
    function.guest.kvm.refusing = ""
    function.bars.decode(0)
    assert (function.decoded, function.guest.slots) == ([False] * 4, [])
