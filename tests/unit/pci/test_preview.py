"""What a guest is going to see of a device that the host still has; it is what the assigned function then shows."""

from __future__ import annotations

import struct

import pytest
from support import config_spaces
from support.fake_function import PENDING_AT, TABLE_AT, VECTORS, Board

from kvmpass.errors import LayoutError
from kvmpass.layout import GIB, MIB, PAGE, Range, plan_layout
from kvmpass.memory import RegionKind
from kvmpass.pci import BarPreview, BarSpace, Vectors, allocate, preview_bars, preview_vectors
from kvmpass.pci.barspace import BarKind

IO, MEMORY, MEMORY64 = 0x100, 0x200, 0x100200  # IORESOURCE_IO, _MEM, _MEM | _MEM_64
NONE: list[tuple[int, int]] = [(0, 0)]


def space(*caps: tuple[int, int, bytes], pin: int = 0) -> bytes:
    """256 bytes with these capabilities: offset, identifier, what follows the pointer."""
    data = bytearray(256)
    data[0x06], data[0x3D] = 0x10 if caps else 0, pin
    at_pointer = 0x34
    for at, number, body in caps:
        data[at_pointer] = at
        data[at : at + 2 + len(body)] = bytes([number, 0]) + body
        at_pointer = at + 1
    return bytes(data)


def msi(capable: int, rest: int = 0) -> bytes:
    return struct.pack("<H", capable << 1 | rest)


def msix(vectors: int, table: int, pending: int, rest: int = 0) -> bytes:
    return struct.pack("<HII", vectors - 1 | rest, table, pending)


@pytest.mark.parametrize("capable, vectors", [(0, 1), (1, 2), (2, 4), (3, 8), (4, 16), (5, 32)])
def test_msi_has_a_power_of_two(capable: int, vectors: int) -> None:
    """Message control: enable in bit 0, capable in 3:1, enabled in 6:4, 64 bits in 7."""
    for rest in (0, 0xFFF1):
        assert preview_vectors(space((0x50, 0x05, msi(capable, rest)))).msi == vectors


@pytest.mark.parametrize("vectors", [1, 2, 16, 64, 65, 128, 129, 2048])
def test_msix_says_where_its_table_and_its_pending_bits_are(vectors: int) -> None:
    """16 bytes for each vector; one bit each, in quadwords. The lowest three bits are the BAR's number."""
    for rest in (0, 0xF800):
        found = preview_vectors(space((0x70, 0x11, msix(vectors, 0x2000 | 3, 0x1_8000 | 5, rest))))
        assert found.msix == vectors
        assert found.trapped == ((3, Range(0x2000, 16 * vectors)), (5, Range(0x1_8000, (vectors + 63) // 64 * 8)))


def test_every_bar_can_hold_the_table() -> None:
    for bar in range(6):
        for table, pending in ((8, 0xFFFF_FFF8), (0xFFFF_FFF8, 8)):
            found = preview_vectors(space((0x70, 0x11, msix(1, table | bar, pending | bar))))
            assert found.trapped == ((bar, Range(table, 16)), (bar, Range(pending, 8)))


def test_the_first_of_two_counts() -> None:
    """As for the function itself: the second is hidden."""
    two = space((0x40, 0x05, msi(1)), (0x50, 0x05, msi(3)), (0x60, 0x11, msix(7, 0, 0)), (0x80, 0x11, msix(9, 0, 0)))
    found = preview_vectors(two)
    assert (found.msi, found.msix, len(found.trapped)) == (2, 7, 2)


def test_neither_and_a_pin() -> None:
    assert preview_vectors(space()) == Vectors(0, 0, False, ())
    for pin in range(1, 5):
        assert preview_vectors(space(pin=pin)) == Vectors(0, 0, True, ())


def test_unreadable_configuration_space_is_unknown() -> None:
    """The kernel gives 64 bytes to non-root users: the pin is among them, the capabilities are not."""
    whole = space((0x50, 0x05, msi(2)), pin=1)
    assert preview_vectors(whole[:64]) == Vectors(None, None, True)
    assert preview_vectors(whole[:255]) == Vectors(None, None, True)
    assert preview_vectors(whole[:63]) == Vectors(None, None, None)
    assert preview_vectors(bytes(64)) == Vectors(None, None, False)
    assert preview_vectors(whole) == Vectors(0, 4, True)


def test_recorded_devices() -> None:
    assert preview_vectors(config_spaces.IGB) == Vectors(10, 1, True, ((3, Range(0, 160)), (3, Range(0x2000, 8))))
    assert preview_vectors(config_spaces.NVME).msix == 0x3F
    assert preview_vectors(config_spaces.ROOT_PORT).trapped == ((0, Range(0, 16)), (0, Range(0x800, 8)))


# --- BARs: size and flags as in `resource`


def test_kinds_names_and_order() -> None:
    lines = [
        (PAGE, MEMORY),
        (0, MEMORY),
        (0x20, IO),
        (PAGE, MEMORY64),
        (0, 0),
        (8, IO),
        (0x8000, MEMORY),
        (PAGE, MEMORY),
    ]
    bars = preview_bars(lines, Vectors(0, 0, False))
    assert [(bar.index, bar.name, bar.kind, bar.size) for bar in bars] == [
        (0, "bar0", BarKind.MEMORY32, PAGE),
        (2, "bar2", BarKind.IO, 0x20),
        (3, "bar3", BarKind.MEMORY64, PAGE),
        (5, "bar5", BarKind.IO, 8),
        (6, "rom", BarKind.MEMORY32, 0x8000),
    ]
    assert [bar.mapped for bar in bars] == [(Range(0, PAGE),), (), (Range(0, PAGE),), (), ()]


def test_a_bar_smaller_than_a_page_is_not_mapped() -> None:
    for size, mapped in ((16, ()), (PAGE // 2, ()), (PAGE, (Range(0, PAGE),)), (16 * MIB, (Range(0, 16 * MIB),))):
        assert preview_bars([(size, MEMORY)], Vectors(0, 0, None))[0].mapped == mapped


def test_flags_as_linux_prints_them() -> None:
    """With the register's own bits, prefetching and alignment; a ROM that is enabled has bit 0."""
    lines = [(PAGE, 0x40200), (PAGE, 0x140204), (PAGE, 0x14220C), (32, 0x40101), *NONE * 2, (PAGE, 0x46201)]
    kinds = [bar.kind for bar in preview_bars(lines, Vectors(0, 0, None))]
    assert kinds == [BarKind.MEMORY32, *[BarKind.MEMORY64] * 2, BarKind.IO, BarKind.MEMORY32]


def test_ports_are_never_mapped() -> None:
    """However many: VFIO has no mmap for them."""
    bars = preview_bars([(PAGE, IO), (16 * PAGE, IO)], Vectors(0, 0, None))
    assert [(bar.kind, bar.mapped) for bar in bars] == [(BarKind.IO, ())] * 2


def test_flags_that_are_no_bar() -> None:
    """Such as IORESOURCE_IRQ; prefetchable memory (0x2000) is memory."""
    assert preview_bars([(PAGE, 0x400), (PAGE, 0x80), (PAGE, 0x2200)], Vectors(0, 0, None))[0].index == 2


def test_the_pages_of_table_and_pending_bits_trap() -> None:
    vectors = Vectors(5, 0, False, ((0, Range(2 * PAGE, 80)), (2, Range(0, 8))))
    bars = preview_bars([(4 * PAGE, MEMORY64), (0, 0), (2 * PAGE, MEMORY)], vectors)
    assert bars[0].mapped == (Range(0, 2 * PAGE), Range(3 * PAGE, PAGE))
    assert bars[1].mapped == (Range(PAGE, PAGE),)


def test_without_configuration_space_only_what_cannot_be_mapped_is_known() -> None:
    bars = preview_bars(
        [(PAGE, MEMORY), (16, MEMORY), (16, IO), *NONE * 3, (PAGE, MEMORY)], Vectors(None, None, None)
    )
    assert [bar.mapped for bar in bars] == [None, (), (), ()]


def test_the_preview_is_what_the_guest_gets() -> None:
    """Of the made-up function of these tests: the same vectors, the same memslots."""
    board = Board()
    vectors = preview_vectors(bytes(board.device.config.data[:256]))
    assert (vectors.msix, vectors.msi, vectors.intx) == (VECTORS, 4, True)
    assert vectors.trapped == ((0, Range(TABLE_AT, 16 * VECTORS)), (0, Range(PENDING_AT, 8)))
    lines = [(4 * PAGE, MEMORY64), (0, 0), (32, IO), (0, 0), (256, MEMORY), (0, 0), (2 * PAGE, MEMORY)]
    bars = preview_bars(lines, vectors)
    board.config_write(0x04, 0x3, 2)
    base = board.layout.mmio64.start
    shown = [Range(r.start - base, r.size) for r in (m.range for m in board.memory if m.kind is RegionKind.BAR)]
    assert shown == [range_ for bar in bars for range_ in bar.mapped or ()]
    board.close()


def test_addresses_are_allocated_as_an_assigned_function_does() -> None:
    """In powers of two: a BAR of 0x1800 bytes takes 0x2000."""
    bar_space = BarSpace(plan_layout(GIB))
    odd = BarPreview(0, BarKind.MEMORY32, 0x1800, ())
    allocate(bar_space, [odd, odd, BarPreview(2, BarKind.IO, 1, ())])
    assert bar_space.allocate(BarKind.MEMORY32, PAGE).start == plan_layout(GIB).mmio32.start + 0x4000
    assert bar_space.allocate(BarKind.IO, 4).start == 0xC004
    exact = BarPreview(3, BarKind.MEMORY64, 4 * PAGE, ())
    allocate(bar_space, [exact, exact])
    assert bar_space.allocate(BarKind.MEMORY64, PAGE).start == plan_layout(GIB).mmio64.start + 8 * PAGE
    with pytest.raises(LayoutError, match="no room"):
        allocate(bar_space, [BarPreview(0, BarKind.MEMORY32, GIB, ())])
