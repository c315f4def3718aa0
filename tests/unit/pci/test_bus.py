"""The guest's PCI bus: which function an access reaches, by ports and by ECAM, and what reaches none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.errors import LayoutError
from kvmpass.pci import ConfigPorts, Ecam, PciBus
from kvmpass.ports import PCI_CONFIG_BASE, PCI_CONFIG_SIZE

ONES = b"\xff" * 8


class Function:
    """4096 bytes, and the accesses to them, inside one aligned dword."""

    def __init__(self, tag: int) -> None:
        self.space = bytearray((tag + at // 256) & 0xFF for at in range(4096))
        self.several: bool | None = None
        self.accesses: list[tuple[int, int]] = []

    def _check(self, offset: int, size: int) -> None:
        assert size > 0 and offset >= 0 and offset // 4 == (offset + size - 1) // 4 and offset + size <= 4096
        self.accesses.append((offset, size))

    def config_read(self, offset: int, size: int) -> bytes:
        self._check(offset, size)
        return bytes(self.space[offset : offset + size])

    def config_write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        self.space[offset : offset + len(data)] = data

    def config_image(self) -> bytes | None:
        return None

    def set_multifunction(self, several: bool) -> None:
        self.several = several


@pytest.fixture
def bus() -> PciBus:
    return PciBus()


def filled() -> tuple[PciBus, dict[tuple[int, int], Function]]:
    """Functions in places whose numbers differ in every bit that there is."""
    bus, functions = PciBus(), {}
    places = [*((slot, 0) for slot in (1, 2, 4, 8, 16)), *((31, number) for number in (0, 1, 2, 4, 7))]
    for tag, place in enumerate(places):
        functions[place] = Function(16 * tag + 1)
        bus.plug(functions[place], *place)
    return bus, functions


# --- places


def test_the_host_bridge_is_in_slot_0(bus: PciBus) -> None:
    """Vendor 1b36, device 0008, class 0600, no capabilities, and no extended space."""
    assert bus.read(0, 0, 0, 8) == bytes.fromhex("361b080000000000")
    assert bus.read(0, 0, 8, 8) == bytes.fromhex("0000000600000000")
    assert bus.read(0, 0, 0xFC, 4) == bytes(4)
    assert bus.read(0, 0, 0x100, 4) == b"\xff" * 4
    bus.write(0, 0, 0, b"\1\2\3\4")
    assert bus.read(0, 0, 0, 4) == bytes.fromhex("361b0800")


def test_slots_are_allocated_in_order_and_reused(bus: PciBus) -> None:
    functions = [Function(n) for n in range(31)]
    for slot, function in enumerate(functions, start=1):
        assert bus.free_slot() == slot
        bus.plug(function, slot)
    with pytest.raises(LayoutError, match="all 32 slots") as full:
        bus.free_slot()
    assert "unplug a device first" in full.value.__notes__[0]
    bus.unplug(functions[6])
    assert bus.free_slot() == 7
    assert bus.read(0, 7 << 3, 0, 4) == ONES[:4]
    bus.unplug(functions[6])


def test_a_slot_with_any_function_is_not_free(bus: PciBus) -> None:
    bus.plug(Function(1), 1, 7)
    assert bus.free_slot() == 2


@pytest.mark.parametrize("slot, number", [(0, 0), (32, 0), (-1, 0), (1, 8), (1, -1)])
def test_invalid_slots_and_functions(bus: PciBus, slot: int, number: int) -> None:
    with pytest.raises(LayoutError, match=f"slot {slot}, function {number} of the guest's PCI bus"):
        bus.plug(Function(1), slot, number)
    bus.plug(Function(1), 31, 7)
    bus.plug(Function(1), 1, 0)
    bus.plug(Function(1), 0, 1)


def test_function_0_has_the_multifunction_bit(bus: PciBus) -> None:
    first, other, third, far = (Function(n) for n in range(4))
    bus.plug(far, 2)
    bus.plug(first, 1)
    assert (first.several, far.several) == (False, False)
    bus.plug(other, 1, 1)
    bus.plug(third, 1, 2)
    assert (first.several, far.several, other.several) == (True, False, None)
    bus.unplug(third)
    assert first.several is True
    bus.unplug(other)
    assert first.several is False
    bus.plug(other, 1, 1)
    bus.unplug(first)
    assert bus.read(0, 1 << 3 | 1, 0, 1) == b"\0" or other.accesses
    bus.plug(first, 1)
    assert first.several is True, "it comes last"


# --- accesses


def test_an_access_is_split_at_dwords(bus: PciBus) -> None:
    bus.plug(function := Function(1), 1)
    for offset, size, parts in (
        (0, 4, [(0, 4)]),
        (0, 8, [(0, 4), (4, 4)]),
        (3, 1, [(3, 1)]),
        (3, 2, [(3, 1), (4, 1)]),
        (6, 8, [(6, 2), (8, 4), (12, 2)]),
        (5, 5, [(5, 3), (8, 2)]),
        (4092, 4, [(4092, 4)]),
    ):
        function.accesses.clear()
        assert bus.read(0, 8, offset, size) == bytes(function.space[offset : offset + size])
        assert function.accesses == parts
        function.accesses.clear()
        data = bytes(range(0xA0, 0xA0 + size))
        bus.write(0, 8, offset, data)
        assert function.accesses == parts
        assert function.space[offset : offset + size] == data


def test_accesses_beyond_the_end_of_a_function_are_dropped(bus: PciBus) -> None:
    bus.plug(function := Function(1), 1)
    before = bytes(function.space)
    for offset, size in ((4093, 4), (4095, 2), (4092, 8)):
        assert bus.read(0, 8, offset, size) == ONES[:size]
        bus.write(0, 8, offset, bytes(size))
    assert (bytes(function.space), function.accesses) == (before, [])


def test_there_is_one_bus(bus: PciBus) -> None:
    bus.plug(function := Function(1), 1)
    for number in (1, 2, 255, -1):
        assert bus.read(number, 8, 0, 4) == ONES[:4]
        bus.write(number, 8, 0, bytes(4))
    assert function.accesses == []
    assert bus.read(0, 0xFF, 0, 4) == ONES[:4]
    bus.write(0, 0xFF, 0, bytes(4))


# --- ECAM: bus in bits 27:20, slot in 19:15, function in 14:12 (PCI Express base, section 7.2.2)


def test_ecam_addresses_name_slot_and_function() -> None:
    bus, functions = filled()
    ecam = Ecam(bus)
    for (slot, number), function in functions.items():
        base = slot << 15 | number << 12
        for offset in (0, 0x40, 0x100, 0xFFC):
            assert ecam.read(base + offset, 4) == bytes(function.space[offset : offset + 4])
        ecam.write(base + 0x7F4, b"here")
        ecam.write(base + 0xFFF, b"!")
    for function in functions.values():
        assert function.space[0x7F4:0x7F8] + function.space[0xFFF:] == b"here!"
    assert ecam.read(3 << 15, 4) == ONES[:4]
    assert ecam.read(1 << 20 | 1 << 15, 4) == ONES[:4], "bus 1"
    ecam.write(1 << 20 | 1 << 15, bytes(4))
    assert functions[1, 0].space[:4] == bytes([1] * 4)
    assert ecam.read((1 << 15) + 0xFFE, 4) == ONES[:4], "over the end, into the next function"


# --- the ports: enable in bit 31, bus 23:16, slot 15:11, function 10:8, register 7:2 (PCI Local Bus 3.0, 3.2.2.3.2)


def select(ports: ConfigPorts, slot: int, number: int = 0, register: int = 0, bus: int = 0, enable: int = 1) -> None:
    value = enable << 31 | bus << 16 | slot << 11 | number << 8 | register
    ports.write(0, value.to_bytes(4, "little"))


def test_ports_are_where_a_pc_has_them() -> None:
    assert (PCI_CONFIG_BASE, PCI_CONFIG_SIZE) == (0xCF8, 8)


def test_the_address_register_names_slot_function_and_register() -> None:
    bus, functions = filled()
    ports = ConfigPorts(bus)
    for (slot, number), function in functions.items():
        function.space[0x80:0x100] = bytes((slot * 8 + number + at) & 0xFF for at in range(0x80))
        for register in (0, 0x04, 0x40, 0x80, 0xFC):
            select(ports, slot, number, register)
            assert ports.read(4, 4) == bytes(function.space[register : register + 4])
            for byte, size in ((0, 1), (1, 1), (2, 2), (3, 1), (0, 2), (1, 3)):
                assert ports.read(4 + byte, size) == bytes(function.space[register + byte : register + byte + size])
        select(ports, slot, number, 0x44)
        ports.write(4, b"port")
        ports.write(7, b"s")
    for function in functions.values():
        assert function.space[0x44:0x48] == b"pors"


def test_the_address_register_reads_back_without_its_reserved_bits() -> None:
    ports = ConfigPorts(PciBus())
    assert ports.read(0, 4) == bytes(4)
    ports.write(0, b"\xff" * 4)
    assert ports.read(0, 4) == (0x80FF_FFFC).to_bytes(4, "little")
    assert [ports.read(at, 1) for at in range(4)] == [b"\xfc", b"\xff", b"\xff", b"\x80"]
    assert ports.read(2, 2) == b"\xff\x80"
    assert ports.read(2, 4) == b"\xff\x80\xff\xff", "behind it: nothing"
    ports.write(0, (0x0102_0304).to_bytes(4, "little"))
    assert ports.read(0, 4) == (0x0002_0304).to_bytes(4, "little")


@pytest.mark.parametrize(
    "offset, size", [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3), (2, 2), (3, 1), (0, 8), (1, 4), (2, 4), (3, 4)]
)
def test_only_a_whole_dword_reaches_the_address_register(offset: int, size: int) -> None:
    ports = ConfigPorts(PciBus())
    select(ports, 5, register=0x10)
    before = ports.read(0, 4)
    ports.write(offset, bytes(size))
    assert ports.read(0, 4) == before


def test_data_is_unreachable_while_the_enable_bit_is_clear() -> None:
    bus, functions = filled()
    ports = ConfigPorts(bus)
    select(ports, 1, enable=0)
    assert ports.read(4, 4) == ONES[:4]
    ports.write(4, bytes(4))
    assert functions[1, 0].accesses == []
    select(ports, 1)
    assert ports.read(4, 4) == bytes([1] * 4)


def test_the_ports_reach_bus_0_only() -> None:
    bus, functions = filled()
    ports = ConfigPorts(bus)
    for number in (1, 2, 0x80, 0xFF):
        select(ports, 1, bus=number)
        assert ports.read(4, 4) == ONES[:4]
        ports.write(4, bytes(4))
    assert functions[1, 0].accesses == []


def test_the_ports_reach_256_bytes_of_a_function() -> None:
    bus, functions = filled()
    ports, function = ConfigPorts(bus), functions[1, 0]
    select(ports, 1, register=0xFC)
    function.space[0xFC:0x108] = bytes(range(12))
    assert ports.read(4, 4) == bytes(range(4))
    assert ports.read(7, 1) == b"\3"
    for offset, size in ((4, 8), (7, 2), (6, 4)):
        assert ports.read(offset, size) == ONES[:size]
        ports.write(offset, bytes(size))
    assert function.space[0xFC:0x108] == bytes(range(12))
    ports.write(4, b"last")
    assert function.space[0xFC:0x100] == b"last"


@given(st.integers(0, (1 << 20) - 1), st.sampled_from([1, 2, 3, 4, 5, 8]))
def test_ecam_and_ports_agree(address: int, size: int) -> None:
    bus, functions = filled()
    ecam, ports = Ecam(bus), ConfigPorts(bus)
    place, offset = (address >> 15, address >> 12 & 7), address & 0xFFF
    function = functions.get(place)
    whole = offset + size <= 4096
    expected = bytes(function.space[offset : offset + size]) if function and whole else ONES[:size]
    if place != (0, 0):
        assert ecam.read(address, size) == expected
        if offset + size <= 256:
            select(ports, *place, register=offset & ~3)
            assert ports.read(4 + offset % 4, size) == expected
