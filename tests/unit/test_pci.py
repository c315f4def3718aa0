"""The guest's view of an assigned function, over a device that is made up here; nothing in it trusts the guest."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpass.bus import Bus
from kvmpass.kvm.routing import IOAPIC_PINS
from kvmpass.layout import GIB, MIB, PAGE, Range, plan_layout
from kvmpass.memory import GuestMemory, HostMapping, RegionKind
from kvmpass.pci import CONFIG_ADDRESS, CONFIG_PORTS, AssignedFunction, BarSpace, ConfigPorts, Ecam, PciBus
from kvmpass.pci.bar import mappable
from kvmpass.pci.config import capabilities
from kvmpass.pci.space import BarKind
from kvmpass.vfio.device import CONFIG, MSIX, IrqInfo, RegionInfo

TABLE_AT, VECTORS = 0x2000, 5
MSIX_AT, EXPRESS_AT, MSI_AT, PM_AT = 0x40, 0x60, 0xA0, 0xB0


class FakeRegion:
    """A region as bytes; configuration space keeps a command register that works."""

    def __init__(self, info: RegionInfo, data: bytearray) -> None:
        self.info = info
        self.data = data
        self.accesses: list[tuple[str, int, int]] = []

    @property
    def size(self) -> int:
        return self.info.size

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0 and offset + size <= self.size
        self.accesses.append(("read", offset, size))
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        assert offset >= 0 and offset + len(data) <= self.size
        self.accesses.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def read_int(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def mmap(self, area: Range) -> HostMapping:
        return HostMapping(area.size)


class FakeDevice:
    """BAR0: 64-bit, 16 KiB, with the MSI-X table in its third page; BAR2: I/O; BAR4: 32-bit, 256 bytes."""

    def __init__(self) -> None:
        self.name = "0000:00:00.0"
        config = bytearray(4096)
        config[0:4] = bytes.fromhex("34128765")
        config[0x06] = 0x10
        config[0x0E] = 0x80
        config[0x10:0x14] = (0x4).to_bytes(4, "little")
        config[0x18:0x1C] = (0x1).to_bytes(4, "little")
        config[0x34] = MSI_AT
        for at, id_, following in (
            (MSI_AT, 0x05, MSIX_AT),
            (MSIX_AT, 0x11, PM_AT),
            (PM_AT, 0x01, EXPRESS_AT),
            (EXPRESS_AT, 0x10, 0),
        ):
            config[at : at + 2] = bytes([id_, following])
        config[MSIX_AT + 2 : MSIX_AT + 4] = (VECTORS - 1).to_bytes(2, "little")
        config[MSIX_AT + 4 : MSIX_AT + 8] = TABLE_AT.to_bytes(4, "little")
        config[EXPRESS_AT + 2 : EXPRESS_AT + 4] = (0x0002).to_bytes(2, "little")
        config[EXPRESS_AT + 0x0C : EXPRESS_AT + 0x14] = b"\xff" * 8
        config[0x100:0x104] = b"\x01\x00\x01\x00"
        self.regions = {
            0: self._region(0, 4 * PAGE, mmap=True),
            2: self._region(2, 32),
            4: self._region(4, 256),
            CONFIG: FakeRegion(RegionInfo(CONFIG, 4096, 0, True, True, (), False), config),
        }
        self.irqs = {MSIX: IrqInfo(MSIX, VECTORS, True, False, False, True)}
        self.irq_calls: list[tuple[Any, ...]] = []

    def _region(self, index: int, size: int, mmap: bool = False) -> FakeRegion:
        areas = (Range(0, size),) if mmap else ()
        return FakeRegion(RegionInfo(index, size, 0, True, True, areas, True), bytearray(size))

    @property
    def config(self) -> FakeRegion:
        return self.regions[CONFIG]

    def set_irqs(self, index: int, start: int, eventfds: list[int]) -> None:
        assert index == MSIX
        assert start >= 0 and start + len(eventfds) <= VECTORS
        for fd in eventfds:
            assert fd == -1 or os.fstat(fd)
        self.irq_calls.append(("set", start, len(eventfds)))

    def disable_irqs(self, index: int) -> None:
        self.irq_calls.append(("disable",))


class FakeKvm:
    """irqfds and routes, with KVM's rules."""

    def __init__(self) -> None:
        self.routes: dict[int, tuple[int, int]] = {}
        self.irqfds: dict[int, int] = {}

    def add(self, address: int, data: int) -> int:
        assert address >> 32 == 0
        gsi = next(n for n in range(IOAPIC_PINS, 4096) if n not in self.routes)
        self.routes[gsi] = (address, data)
        return gsi

    def remove(self, gsi: int) -> None:
        assert gsi not in self.irqfds, "the route goes after the irqfd"
        del self.routes[gsi]

    def irqfd(self, eventfd: int, gsi: int) -> None:
        assert gsi in self.routes, "the route comes before the irqfd"
        assert gsi not in self.irqfds
        self.irqfds[gsi] = eventfd

    def irqfd_deassign(self, eventfd: int, gsi: int) -> None:
        assert self.irqfds.pop(gsi) == eventfd


class Board:
    def __init__(self) -> None:
        self.layout = plan_layout(MIB)
        self.memory = GuestMemory()
        self.ports, self.mmio, self.pci = Bus("port"), Bus("memory"), PciBus()
        self.ports.add(CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts(self.pci))
        self.mmio.add(self.layout.ecam.start, self.layout.ecam.size, Ecam(self.pci))
        self.space = BarSpace(self.layout)
        self.device, self.kvm = FakeDevice(), FakeKvm()
        self.function = AssignedFunction(
            self.device,
            self.kvm,
            self.kvm,
            self.memory,
            self.ports,
            self.mmio,
            self.space,  # type: ignore[arg-type]
        )
        self.slot = self.pci.plug(self.function)
        self.lock = threading.Lock()

    def config_read(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.pci.read(0, self.slot << 3, offset, size), "little")

    def config_write(self, offset: int, value: int, size: int = 4) -> None:
        self.pci.write(0, self.slot << 3, offset, value.to_bytes(size, "little"))

    def bars(self) -> list[Range]:
        return [region.range for region in self.memory if region.kind is RegionKind.BAR]

    def close(self) -> None:
        self.pci.unplug(self.function)
        self.function.close()
        assert self.bars() == []
        assert self.kvm.routes == {} == self.kvm.irqfds
        self.memory.close()


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def test_capabilities_that_are_not_known_to_work_are_hidden(board: Board) -> None:
    found = capabilities(lambda offset, size: board.config_read(offset, size))
    assert [(cap.id, cap.offset) for cap in found] == [(0x11, MSIX_AT), (0x10, EXPRESS_AT)]
    assert board.config_read(0x100) == 0
    assert board.config_read(MSI_AT) == 0 == board.config_read(PM_AT)
    assert board.config_read(EXPRESS_AT + 2, 2) == 0x0092, "an integrated endpoint"
    assert board.config_read(EXPRESS_AT + 0x0C) == 0, "without a link"
    assert board.config_read(0x0E, 1) == 0, "one function"
    assert board.config_read(0x3C, 2) == 0x00FF, "no pin"


def test_a_list_of_capabilities_that_loops_ends() -> None:
    config = {0x06: 0x10, 0x34: 0x40, 0x40: 0x11, 0x41: 0x50, 0x50: 0x10, 0x51: 0x40}
    assert len(capabilities(lambda offset, size: config.get(offset, 0))) == 2


def test_bars_are_sized_and_placed(board: Board) -> None:
    home = board.config_read(0x10) & ~0xF | board.config_read(0x14) << 32
    assert home == board.layout.mmio64.start
    board.config_write(0x10, 0xFFFF_FFFF)
    board.config_write(0x14, 0xFFFF_FFFF)
    size = board.config_read(0x10) & ~0xF | board.config_read(0x14) << 32
    assert -size & (1 << 64) - 1 == 4 * PAGE
    assert board.config_read(0x10) & 0xF == 4
    board.config_write(0x18, 0xFFFF_FFFF)
    assert board.config_read(0x18) == 0xFFFF_FFE1
    assert board.config_read(0x1C) == 0
    board.config_write(0x20, 0xFFFF_FFFF)
    assert board.config_read(0x20) == 0xFFFF_FF00
    assert board.bars() == []


def test_decoding_connects_what_may_be_mapped_and_traps_the_rest(board: Board) -> None:
    base = board.layout.mmio64.start
    board.config_write(0x04, 0x3, 2)
    assert board.bars() == [Range(base, 2 * PAGE), Range(base + 3 * PAGE, PAGE)]
    board.device.regions[0].data[TABLE_AT + 0x800] = 0x5A
    assert board.mmio.read(base + TABLE_AT + 0x800, 1) == b"\x5a"
    assert board.mmio.read(base + TABLE_AT, 16) == bytes(12) + b"\1\0\0\0"
    io = board.config_read(0x18) & ~3
    board.ports.write(io + 4, b"\x77")
    assert board.device.regions[2].data[4] == 0x77
    board.config_write(0x04, 0, 2)
    assert board.bars() == []
    assert board.mmio.read(base, 4) == b"\xff" * 4
    assert board.ports.read(io, 4) == b"\xff" * 4


def test_a_bar_moves_while_it_decodes_and_only_inside_the_windows(board: Board) -> None:
    board.config_write(0x04, 0x2, 2)
    target = board.layout.mmio64.start + GIB
    board.config_write(0x10, target & 0xFFFF_FFFF)
    board.config_write(0x14, target >> 32)
    assert board.bars()[0].start == target
    for bad in (0, 0x10_0000, board.layout.ecam.start, 0xFEE0_0000, (1 << 64) - 4 * PAGE):
        board.config_write(0x10, bad & 0xFFFF_FFFF)
        board.config_write(0x14, bad >> 32)
        assert board.bars() == [], hex(bad)


def test_decoding_is_off_in_the_guest_before_the_device_hears_of_it(board: Board) -> None:
    states = []
    real = board.device.config.write

    def write(offset: int, data: bytes) -> None:
        states.append((data[0] & 2, len(board.bars())))
        real(offset, data)

    board.device.config.write = write  # type: ignore[method-assign]
    board.config_write(0x04, 0x2, 2)
    board.config_write(0x04, 0x0, 2)
    assert states == [(2, 0), (0, 0)]


def enable(board: Board, control: int = 0x8000) -> int:
    """Decode, enable MSI-X; returns the table's address."""
    board.config_write(0x04, 0x6, 2)
    board.config_write(MSIX_AT + 2, control, 2)
    return board.layout.mmio64.start + TABLE_AT


def program(board: Board, table: int, vector: int, address: int = 0xFEE0_1000, data: int = 0x41) -> None:
    board.mmio.write(table + 16 * vector, address.to_bytes(8, "little"))
    board.mmio.write(table + 16 * vector + 8, data.to_bytes(4, "little"))
    board.mmio.write(table + 16 * vector + 12, bytes(4))


def test_vectors_get_routes_when_unmasked_and_lose_them_when_masked(board: Board) -> None:
    table = enable(board)
    assert board.device.irq_calls == [("set", 0, 1)], "vector 0 turns MSI-X on"
    program(board, table, 3)
    assert list(board.kvm.routes.values()) == [(0xFEE0_1000, 0x41)]
    assert board.device.irq_calls[1:] == [("set", 3, 1)]
    board.mmio.write(table + 3 * 16 + 8, (0x52).to_bytes(4, "little"))
    assert list(board.kvm.routes.values()) == [(0xFEE0_1000, 0x52)]
    board.mmio.write(table + 3 * 16 + 12, b"\1\0\0\0")
    assert board.kvm.routes == {} == board.kvm.irqfds
    program(board, table, 3)
    board.config_write(MSIX_AT + 2, 0xC000, 2)
    assert board.kvm.routes == {}, "the function is masked"
    board.config_write(MSIX_AT + 2, 0x8000, 2)
    assert len(board.kvm.irqfds) == 1
    board.config_write(MSIX_AT + 2, 0, 2)
    assert board.kvm.irqfds == {}
    assert board.device.irq_calls[-1] == ("disable",)


def test_older_kernels_take_new_vectors_only_all_at_once(board: Board) -> None:
    board.function._msix._resizable = False  # type: ignore[union-attr]
    table = enable(board)
    program(board, table, 2)
    assert board.device.irq_calls == [("set", 0, 1), ("disable",), ("set", 0, 3)]


def test_a_message_that_is_no_interrupt_is_not_routed(board: Board) -> None:
    table = enable(board)
    for address in (0, 0x1000, 0xFEF0_0000, 1 << 32 | 0xFEE0_0000, (1 << 64) - 1):
        program(board, table, 1, address)
        assert board.kvm.routes == {}


def test_kvm_refusing_a_route_does_not_end_the_guest(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, data: int) -> int:
        raise OSError(22, "KVM_SET_GSI_ROUTING")

    monkeypatch.setattr(board.kvm, "add", refuse)
    table = enable(board)
    program(board, table, 1)
    assert board.kvm.irqfds == {}


def test_what_vfio_refuses_reads_as_ones(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bytes:
        raise OSError(5, "EIO")

    board.config_write(0x04, 0x3, 2)
    region = board.device.regions[4]
    monkeypatch.setattr(region, "read", refuse)
    monkeypatch.setattr(region, "write", refuse)
    base = board.config_read(0x20) & ~0xF
    assert board.mmio.read(base + 8, 4) == b"\xff" * 4
    board.mmio.write(base + 8, bytes(4))


def test_two_functions_have_their_own_ranges() -> None:
    space = BarSpace(plan_layout(MIB))
    kinds = (BarKind.MEMORY32, BarKind.MEMORY64, BarKind.IO)
    made = [(kind, space.allocate(kind, size)) for size in (16, PAGE, 64) for kind in kinds]
    for at, (kind, one) in enumerate(made):
        assert space.allows(kind, one)
        assert one.start % one.size == 0
        for other_kind, other in made[at + 1 :]:
            assert kind is not other_kind or not one.overlaps(other)
    for kind, one in made:
        space.free(kind, one)
    assert space.allocate(BarKind.IO, 32).start == 0xC000


def test_the_tables_pages_are_cut_out() -> None:
    whole = (Range(0, 16 * PAGE),)
    assert mappable(whole, None) == [Range(0, 16 * PAGE)]
    assert mappable(whole, Range(PAGE + 8, 16)) == [Range(0, PAGE), Range(2 * PAGE, 14 * PAGE)]
    assert mappable(whole, Range(0, 17 * PAGE)) == []
    assert mappable((Range(100, PAGE),), None) == []
    assert mappable((Range(0, PAGE), Range(8 * PAGE, PAGE)), Range(8 * PAGE, 16)) == [Range(0, PAGE)]


access = st.tuples(
    st.sampled_from(["config", "ecam", "ports", "mmio", "io"]),
    st.integers(0, 0x1010),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.none(), st.binary(min_size=8, max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(access, min_size=1, max_size=60))
def test_random_accesses_do_no_harm(accesses: list[tuple[str, int, int, bytes | None]]) -> None:
    """No exception, exact sizes, and no memslot outside of the windows."""
    board = Board()
    ecam = board.layout.ecam.start + (board.slot << 15)
    for where, offset, size, data in accesses:
        bus, at = {
            "config": (SimpleNamespace(read=_config(board, True), write=_config(board, False)), offset % 0x110),
            "ecam": (board.mmio, ecam + offset),
            "ports": (board.ports, CONFIG_ADDRESS + offset % 12),
            "mmio": (board.mmio, board.layout.mmio64.start + TABLE_AT + offset % 0x100),
            "io": (board.ports, 0xC000 + offset % 64),
        }[where]
        if data is None:
            assert len(bus.read(at, size)) == size
        else:
            bus.write(at, data[:size])
        for bar in board.bars():
            assert board.space.allows(BarKind.MEMORY64, bar)
        assert set(board.kvm.irqfds) == set(board.kvm.routes)
    board.close()


def _config(board: Board, read: bool) -> Any:
    method = board.pci.read if read else board.pci.write
    return lambda at, what: method(0, board.slot << 3, at, what)
