"""The guest's view of an assigned function, over a device that is made up; nothing in it trusts the guest."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_function import (
    EXPRESS_AT,
    GSIS,
    HIDDEN_AT,
    MSI_AT,
    MSIX_AT,
    PENDING_AT,
    PM_AT,
    TABLE_AT,
    Board,
    FakeDevice,
)

from kvmpass import ports
from kvmpass.errors import LayoutError
from kvmpass.layout import GIB, MIB, PAGE, Range, plan_layout
from kvmpass.memory import HostMapping
from kvmpass.pci import BarSpace
from kvmpass.pci.bar import mappable
from kvmpass.pci.barspace import BarKind
from kvmpass.pciregs import capabilities, extended_capabilities
from kvmpass.vfio.device import INTX, MSI, MSIX


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def test_known_capabilities_are_shown_and_the_others_hidden(board: Board) -> None:
    found = capabilities(board.config_read)
    assert [(cap.id, cap.offset) for cap in found] == [
        (0x05, MSI_AT),
        (0x11, MSIX_AT),
        (0x01, PM_AT),
        (0x10, EXPRESS_AT),
    ]
    assert board.config_read(HIDDEN_AT) == 0 == board.config_read(HIDDEN_AT + 4)
    assert board.config_read(EXPRESS_AT + 2, 2) == 0x0092, "an integrated endpoint"
    assert board.config_read(EXPRESS_AT + 0x0C) == 0, "without a link"
    assert board.config_read(0x0E, 1) == 0, "one function"
    assert board.config_read(0x3C, 2) == 0x01FF, "INTA"


def test_the_extended_list_starts_with_a_null_capability_where_the_first_is_hidden(board: Board) -> None:
    found = extended_capabilities(board.config_read)
    assert [(cap.id, cap.offset) for cap in found] == [(0, 0x100), (0x03, 0x140), (0x0B, 0x160)]
    assert board.config_read(0x104) == 0 == board.config_read(0x154), "nothing of SR-IOV and ATS"
    assert board.config_read(0x100) >> 16 & 0xF == 1


def test_a_device_without_extended_space_has_zeroes_there() -> None:
    device = FakeDevice()
    info = device.config.info
    device.config.info = type(info)(info.index, 256, 0, True, True, ())
    board = Board(device)
    assert board.config_read(0x100) == 0
    board.config_write(0x100, 0xFFFF_FFFF)
    assert board.config_read(0x100) == 0
    board.close()


def test_a_list_of_capabilities_that_loops_ends() -> None:
    config = {0x06: 0x10, 0x34: 0x40, 0x40: 0x5011, 0x50: 0x4010}
    assert [cap.offset for cap in capabilities(lambda offset, size: config.get(offset, 0))] == [0x40, 0x50]
    looping = {0x100: 0x140_1_0003, 0x140: 0x100_1_000B}
    found = extended_capabilities(lambda offset, size: looping.get(offset, 0))
    assert [(cap.id, cap.offset, cap.end) for cap in found] == [(3, 0x100, 0x140), (0xB, 0x140, 0x1000)]


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


def test_decoding_maps_the_mappable_areas_and_traps_the_rest(board: Board) -> None:
    base = board.layout.mmio64.start
    board.config_write(0x04, 0x3, 2)
    assert board.bars() == [Range(base, 2 * PAGE), Range(base + 3 * PAGE, PAGE)]
    board.device.regions[0].data[TABLE_AT + 0x900] = 0x5A
    assert board.mmio.read(base + TABLE_AT + 0x900, 1) == b"\x5a"
    assert board.mmio.read(base + TABLE_AT, 16) == bytes(12) + b"\1\0\0\0"
    io = board.config_read(0x18) & ~3
    board.ports.write(io + 4, b"\x77")
    assert board.device.regions[2].data[4] == 0x77
    assert board.mmio.read(base + PENDING_AT, 8) == bytes(8)
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


def test_decoding_is_off_in_the_guest_before_the_device_is_written(board: Board) -> None:
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


def test_older_kernels_add_vectors_only_by_a_restart(board: Board) -> None:
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


def test_the_msix_tables_pages_are_not_mapped() -> None:
    whole = (Range(0, 16 * PAGE),)
    assert mappable(whole) == [Range(0, 16 * PAGE)]
    assert mappable(whole, [Range(PAGE + 8, 16)]) == [Range(0, PAGE), Range(2 * PAGE, 14 * PAGE)]
    assert mappable(whole, [Range(0, 17 * PAGE)]) == []
    assert mappable((Range(100, PAGE),)) == []
    assert mappable((Range(0, PAGE), Range(8 * PAGE, PAGE)), [Range(8 * PAGE, 16)]) == [Range(0, PAGE)]
    two = [Range(PAGE, 80), Range(3 * PAGE + 8, 8)]
    assert mappable(whole, two) == [Range(0, PAGE), Range(2 * PAGE, PAGE), Range(4 * PAGE, 12 * PAGE)]


def test_a_bar_on_top_of_another_waits_until_that_one_moves() -> None:
    board = Board()
    other_device = FakeDevice()
    other = board.make_at(2, other_device)
    board.config_write(0x04, 0x2, 2)
    home = board.layout.mmio64.start
    board.pci.write(0, 2 << 3, 0x10, (home & 0xFFFF_FFFF).to_bytes(4, "little"))
    board.pci.write(0, 2 << 3, 0x14, (home >> 32).to_bytes(4, "little"))
    board.pci.write(0, 2 << 3, 0x04, b"\2\0")
    other_device.regions[0].data[TABLE_AT + 0x900] = 0x22
    assert board.mmio.read(home + TABLE_AT + 0x900, 1) == b"\0", "the first keeps its place"
    board.config_write(0x14, (home >> 32) + 1)
    assert board.mmio.read(home + TABLE_AT + 0x900, 1) == b"\x22", "the other has the range"
    assert {range_.start for range_ in board.bars()} >= {home, home + (1 << 32)}
    board.config_write(0x14, home >> 32)
    assert board.mmio.read(home + TABLE_AT + 0x900, 1) == b"\x22"
    board.pci.write(0, 2 << 3, 0x04, b"\0\0")
    assert board.mmio.read(home + TABLE_AT + 0x900, 1) == b"\0", "and back"
    board.pci.unplug(other)
    other.close()
    board.close()


def test_nothing_is_decoded_while_the_guest_sizes_a_bar(board: Board) -> None:
    board.config_write(0x04, 0x2, 2)
    home = board.bars()[0]
    board.config_write(0x10, 0xFFFF_FFFF)
    assert board.bars() == []
    board.config_write(0x14, 0xFFFF_FFFF)
    assert board.bars() == []
    board.config_write(0x10, home.start & 0xFFFF_FFFF)
    assert board.bars() == []
    board.config_write(0x14, home.start >> 32)
    assert board.bars()[0] == home


@pytest.mark.parametrize("size", [256 * MIB, 512 * MIB, GIB, 2 * GIB])
def test_a_large_bar_decodes_at_every_place_it_may_have(size: int) -> None:
    """Where all address bits of the lower half are ones, too: that is a place like any other."""
    device = FakeDevice()
    device.config.data[0x10:0x14] = (0xC).to_bytes(4, "little")
    info = device.regions[0].info
    device.regions[0].info = type(info)(0, size, 0, True, True, (Range(0, size),))
    device.regions[0].mmap = lambda area: HostMapping(PAGE)  # type: ignore[method-assign]
    board = Board(device)
    window = board.layout.mmio64
    for address in range(-(-window.start // size) * size, window.start + 5 * GIB, size):
        board.config_write(0x04, 0, 2)
        board.config_write(0x10, address & 0xFFFF_FFFF)
        board.config_write(0x14, address >> 32)
        board.config_write(0x04, 2, 2)
        assert board.bars()[0].start == address, hex(address)
        board.config_write(0x10, 0xFFFF_FFFF)
        assert board.bars() == []
        assert board.config_read(0x10) == -size & 0xFFFF_FFFF | 0xC
        board.config_write(0x10, address & 0xFFFF_FFFF)
        assert board.bars()[0].start == address, hex(address)
    board.close()


def test_the_expansion_rom_decodes_only_when_enabled(board: Board) -> None:
    board.config_write(0x30, 0xFFFF_FFFF)
    assert board.config_read(0x30) == 0xFFFF_E001, "8 KiB"
    board.config_write(0x30, board.layout.mmio32.start + MIB)
    board.config_write(0x04, 0x2, 2)
    assert board.mmio.read(board.layout.mmio32.start + MIB, 4) == b"\xff" * 4
    board.config_write(0x30, board.layout.mmio32.start + MIB | 1)
    assert board.mmio.read(board.layout.mmio32.start + MIB, 4) == b"\x55\xaa\x04\x00"
    board.mmio.write(board.layout.mmio32.start + MIB, b"\0")
    assert board.mmio.read(board.layout.mmio32.start + MIB, 1) == b"\x55"
    board.config_write(0x04, 0, 2)
    assert board.mmio.read(board.layout.mmio32.start + MIB, 4) == b"\xff" * 4


def test_a_device_outside_of_d0_decodes_nothing(board: Board) -> None:
    board.config_write(0x04, 0x2, 2)
    assert board.bars()
    board.config_write(PM_AT + 4, 3, 2)
    assert board.bars() == []
    board.config_write(0x04, 0x6, 2)
    assert board.bars() == []
    board.config_write(PM_AT + 4, 0, 2)
    assert board.bars()


def test_reserved_and_read_only_bits_keep_their_values(board: Board) -> None:
    before = [board.config_read(at) for at in range(0x40, 0xC0, 4) if not MSIX_AT <= at < MSIX_AT + 4]
    for at in (MSIX_AT + 4, MSIX_AT + 8, EXPRESS_AT + 0x0C, HIDDEN_AT):
        board.config_write(at, 0xFFFF_FFFF)
    assert before == [board.config_read(at) for at in range(0x40, 0xC0, 4) if not MSIX_AT <= at < MSIX_AT + 4]
    board.config_write(MSI_AT, 0xFFFE_FFFF)
    assert board.config_read(MSI_AT, 2) == 0x05 | MSIX_AT << 8
    assert board.config_read(MSI_AT + 2, 2) == 1 << 8 | 1 << 7 | 7 << 4 | 2 << 1
    board.config_write(MSI_AT + 4, 0xFFFF_FFFF)
    assert board.config_read(MSI_AT + 4) == 0xFFFF_FFFC
    board.config_write(MSI_AT + 16, 0xFFFF_FFFF)
    assert board.config_read(MSI_AT + 16) == 0xF, "four vectors can be masked"
    board.config_write(0x3C, 0x0A, 1)
    assert board.config_read(0x3C, 2) == 0x010A


def program_msi(board: Board, *, multiple: int = 2, address: int = 0xFEE0_2000, data: int = 0x50) -> None:
    board.config_write(MSI_AT + 4, address & 0xFFFF_FFFF)
    board.config_write(MSI_AT + 8, address >> 32)
    board.config_write(MSI_AT + 12, data, 2)
    board.config_write(MSI_AT + 2, multiple << 4 | 1, 2)


def test_msi_vectors_share_an_address_and_number_their_data(board: Board) -> None:
    assert board.function.interrupt == "INTx"
    program_msi(board)
    assert board.function.interrupt == "MSI"
    assert sorted(board.kvm.routes.values()) == [(0xFEE0_2000, 0x50 + n) for n in range(4)]
    board.config_write(MSI_AT + 16, 0b0010)
    assert sorted(board.kvm.routes.values()) == [(0xFEE0_2000, 0x50 + n) for n in (0, 2, 3)]
    assert board.config_read(MSI_AT + 20) == 0
    board.device.interrupt(1)
    assert board.config_read(MSI_AT + 20) == 0b0010, "pending"
    board.config_write(MSI_AT + 16, 0)
    assert board.config_read(MSI_AT + 20) == 0
    board.config_write(MSI_AT + 12, 0x60, 2)
    assert sorted(board.kvm.routes.values()) == [(0xFEE0_2000, 0x60 + n) for n in range(4)]
    program_msi(board, multiple=0)
    assert list(board.kvm.routes.values()) == [(0xFEE0_2000, 0x50)]
    program_msi(board, multiple=7)
    assert len(board.kvm.routes) == 4, "no more than it is capable of"
    board.config_write(MSI_AT + 4, 0x1000)
    assert board.kvm.routes == {}, "memory is no message"
    board.config_write(MSI_AT + 2, 0, 2)
    assert (board.function.interrupt, board.device.active) == ("INTx", INTX)


def test_a_host_with_fewer_vectors_enables_those(board: Board) -> None:
    real = board.device.set_irqs

    def few(index: int, start: int, eventfds: list[int]) -> None:
        if index == MSI and len(eventfds) > 1:
            raise OSError(errno.ENOSPC, "VFIO_DEVICE_SET_IRQS: the host has no free interrupt vectors")
        real(index, start, eventfds)

    board.device.set_irqs = few  # type: ignore[method-assign]
    program_msi(board)
    assert list(board.kvm.routes.values()) == [(0xFEE0_2000, 0x50)]
    calls = list(board.device.irq_calls)
    board.config_write(MSI_AT + 12, 0x60, 2)
    assert list(board.kvm.routes.values()) == [(0xFEE0_2000, 0x60)]
    assert board.device.irq_calls == calls, "and it is not called again for the same"


def test_one_kind_of_interrupt_is_enabled_at_a_time(board: Board) -> None:
    assert (board.device.active, list(board.kvm.pins.values())) == (INTX, [GSIS[0]])
    program_msi(board)
    assert (board.device.active, board.kvm.pins) == (MSI, {})
    board.config_write(MSIX_AT + 2, 0x8000, 2)
    assert (board.device.active, board.kvm.routes) == (MSIX, {})
    board.config_write(MSIX_AT + 2, 0, 2)
    assert (board.device.active, len(board.kvm.routes)) == (MSI, 4), "it was still enabled"
    board.config_write(MSI_AT + 2, 0, 2)
    assert (board.device.active, board.kvm.routes) == (INTX, {})


def test_what_the_device_raises_while_masked_is_pending(board: Board) -> None:
    table = enable(board)
    program(board, table, 3)
    board.mmio.write(table + 3 * 16 + 12, b"\1\0\0\0")
    pending = board.layout.mmio64.start + PENDING_AT
    assert board.mmio.read(pending, 8) == bytes(8)
    board.device.interrupt(3)
    assert board.mmio.read(pending, 8) == b"\x08" + bytes(7)
    assert board.mmio.read(pending, 4) == b"\x08" + bytes(3)
    board.mmio.write(pending, b"\xff" * 8)
    assert board.mmio.read(pending, 1) == b"\x08"
    program(board, table, 3)
    assert board.mmio.read(pending, 8) == bytes(8), "KVM delivers it"


def test_functions_share_a_slot(board: Board) -> None:
    other = board.make_at(board.slot, FakeDevice(), number=3)
    assert board.config_read(0x0E, 1) == 0x80
    assert board.pci.read(0, board.slot << 3 | 3, 0, 4) == bytes.fromhex("34128765")
    assert board.pci.free_slot() == 2
    with pytest.raises(LayoutError, match="slot 1, function 3"):
        board.pci.plug(other, board.slot, 3)
    board.pci.unplug(other)
    other.close()
    assert board.config_read(0x0E, 1) == 0


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
            "ports": (board.ports, ports.PCI_CONFIG_BASE + offset % 12),
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
        assert bool(board.kvm.pins) == (board.device.active == INTX)
    board.close()


def _config(board: Board, read: bool) -> Any:
    method = board.pci.read if read else board.pci.write
    return lambda at, what: method(0, board.slot << 3, at, what)
