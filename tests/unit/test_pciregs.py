"""The lists of capabilities, MSI and MSI-X: in bytes as devices have them, and as none should have them."""

from __future__ import annotations

import itertools
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support import config_spaces

from kvmpass import pciregs
from kvmpass.pciregs import Capability, capabilities, extended_capabilities


def reader(space: bytes) -> Callable[[int, int], int]:
    def read(offset: int, size: int) -> int:
        assert offset >= 0 and offset + size <= len(space), "outside of the space"
        assert size in (1, 2, 4) and offset % size == 0, "registers are read whole"
        return int.from_bytes(space[offset : offset + size], "little")

    return read


def conventional(chain: list[tuple[int, int]], *, first: int | None = None, status: int = 0x10) -> bytearray:
    """256 bytes with capabilities at these offsets, in this order: ``(offset, identifier)``."""
    space = bytearray(256)
    struct.pack_into("<H", space, 0x06, status)
    space[0x34] = chain[0][0] if first is None else first
    for (at, number), (following, _) in zip(chain, [*chain[1:], (0, 0)], strict=False):
        space[at : at + 2] = bytes([number, following])
    return space


def extended(chain: list[tuple[int, int, int]]) -> bytes:
    """4096 bytes with extended capabilities: ``(offset, identifier, version)``."""
    space = bytearray(4096)
    for (at, number, version), (following, *_) in zip(chain, [*chain[1:], (0, 0, 0)], strict=False):
        struct.pack_into("<I", space, at, number | version << 16 | following << 20)
    return bytes(space)


def test_recorded_devices() -> None:
    """As ``lspci`` showed them."""
    found = capabilities(reader(config_spaces.IGB))
    assert [(c.id, c.offset, c.end) for c in found] == [
        (0x01, 0x40, 0x50),
        (0x05, 0x50, 0x70),
        (0x11, 0x70, 0xA0),
        (0x10, 0xA0, 0x100),
    ]
    above = extended_capabilities(reader(config_spaces.IGB))
    assert [(c.id, c.offset, c.end, c.version) for c in above] == [
        (0x0001, 0x100, 0x150, 1),
        (0x000E, 0x150, 0x160, 1),
        (0x0010, 0x160, 0x1000, 1),
    ]


def test_a_capability_ends_where_the_next_begins_in_memory() -> None:
    """Whatever the order of the list."""
    found = capabilities(reader(conventional([(0xC0, 0x01), (0x40, 0x05), (0x80, 0x11)])))
    assert found == [Capability(0x01, 0xC0, 0x100), Capability(0x05, 0x40, 0x80), Capability(0x11, 0x80, 0xC0)]
    above = extended_capabilities(reader(extended([(0x100, 0x0B, 2), (0x300, 0x01, 1), (0x200, 0x03, 15)])))
    assert above == [
        Capability(0x0B, 0x100, 0x200, 2),
        Capability(0x01, 0x300, 0x1000, 1),
        Capability(0x03, 0x200, 0x300, 15),
    ]


def test_a_device_whose_status_has_no_list() -> None:
    assert capabilities(reader(conventional([(0x40, 0x01)], status=0xFFEF))) == []
    assert [c.offset for c in capabilities(reader(conventional([(0x40, 0x01)], status=0xFFFF)))] == [0x40]


def test_the_lowest_bits_of_a_pointer_are_reserved() -> None:
    space = conventional([(0x40, 0x01), (0x50, 0x05)], first=0x43)
    space[0x41] = 0x52
    assert [c.offset for c in capabilities(reader(space))] == [0x40, 0x50]
    made = bytearray(extended([(0x100, 0x0B, 1), (0x140, 0x03, 1)]))
    struct.pack_into("<I", made, 0x100, 0x0B | 1 << 16 | 0x143 << 20)
    assert [c.offset for c in extended_capabilities(reader(bytes(made)))] == [0x100, 0x140]


@pytest.mark.parametrize("first", [0, 4, 0x3C])
def test_a_pointer_into_the_header_ends_the_list(first: int) -> None:
    space = conventional([(0x40, 0x01)])
    space[0x41] = first
    assert [c.offset for c in capabilities(reader(space))] == [0x40]
    assert capabilities(reader(conventional([(0x40, 0x01)], first=first))) == []


@pytest.mark.parametrize("following", [0x000, 0x040, 0x0FC])
def test_an_extended_pointer_below_0x100_ends_the_list(following: int) -> None:
    space = bytearray(extended([(0x100, 0x0B, 1)]))
    struct.pack_into("<I", space, 0x100, 0x0B | 1 << 16 | following << 20)
    assert [c.offset for c in extended_capabilities(reader(bytes(space)))] == [0x100]


@pytest.mark.parametrize("header", [0, 0xFFFF_FFFF])
def test_an_extended_header_of_zeroes_or_ones_is_the_end(header: int) -> None:
    space = bytearray(extended([(0x100, 0x0B, 1), (0x140, 0x03, 1)]))
    struct.pack_into("<I", space, 0x140, header)
    assert [c.offset for c in extended_capabilities(reader(bytes(space)))] == [0x100]
    struct.pack_into("<I", space, 0x100, header)
    assert extended_capabilities(reader(bytes(space))) == []


def test_the_last_dwords_can_hold_capabilities() -> None:
    """A capability of two bytes at 0xfc: its identifier and its pointer are all that there is."""
    assert capabilities(reader(conventional([(0xFC, 0x09)]))) == [Capability(0x09, 0xFC, 0x100)]
    space = bytearray(extended([(0x100, 0x0B, 1), (0xFFC, 0x03, 1)]))
    assert [c.offset for c in extended_capabilities(reader(bytes(space)))] == [0x100, 0xFFC]


def test_the_list_ends_after_as_many_as_fit() -> None:
    """48 of four bytes each fill the space behind the header."""
    chain = [(at, 0x09) for at in range(0x40, 0x100, 4)]
    assert len(chain) == 48
    assert [c.offset for c in capabilities(reader(conventional(chain)))] == [at for at, _ in chain]
    everything = [(at, 0x0B, 1) for at in range(0x100, 0x1000, 4)]
    assert len(extended_capabilities(reader(extended(everything)))) == 960


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_end_and_nothing_is_found_twice(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        space = bytearray(rng.randbytes(4096))
        space[0x06] |= 0x10
        for found, low, high in (
            (capabilities(reader(space[:256])), 0x40, 0x100),
            (extended_capabilities(reader(space)), 0x100, 0x1000),
        ):
            spans = sorted((c.offset, c.end) for c in found)
            assert all(low <= start < end <= high and start % 4 == 0 for start, end in spans)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


HEADER = Path("/usr/include/linux/pci_regs.h")
NAMES = {
    "COMMAND": "COMMAND",
    "COMMAND_IO": "COMMAND_IO",
    "COMMAND_MEMORY": "COMMAND_MEMORY",
    "COMMAND_MASTER": "COMMAND_MASTER",
    "STATUS": "STATUS",
    "STATUS_CAPABILITIES": "STATUS_CAP_LIST",
    "HEADER_TYPE": "HEADER_TYPE",
    "BAR0": "BASE_ADDRESS_0",
    "ROM": "ROM_ADDRESS",
    "CAPABILITIES": "CAPABILITY_LIST",
    "INTERRUPT_LINE": "INTERRUPT_LINE",
    "INTERRUPT_PIN": "INTERRUPT_PIN",
    "CAP_POWER": "CAP_ID_PM",
    "CAP_VPD": "CAP_ID_VPD",
    "CAP_MSI": "CAP_ID_MSI",
    "CAP_VENDOR": "CAP_ID_VNDR",
    "CAP_EXPRESS": "CAP_ID_EXP",
    "CAP_MSIX": "CAP_ID_MSIX",
    "CAP_SATA": "CAP_ID_SATA",
    "CAP_ADVANCED_FEATURES": "CAP_ID_AF",
    "EXT_AER": "EXT_CAP_ID_ERR",
    "EXT_SERIAL_NUMBER": "EXT_CAP_ID_DSN",
    "EXT_POWER_BUDGETING": "EXT_CAP_ID_PWR",
    "EXT_VENDOR": "EXT_CAP_ID_VNDR",
    "EXT_ACS": "EXT_CAP_ID_ACS",
    "EXT_ATS": "EXT_CAP_ID_ATS",
    "EXT_SRIOV": "EXT_CAP_ID_SRIOV",
    "EXT_PRI": "EXT_CAP_ID_PRI",
    "EXT_PASID": "EXT_CAP_ID_PASID",
    "EXT_DESIGNATED_VENDOR": "EXT_CAP_ID_DVSEC",
}


def test_numbers_are_those_of_the_kernels_header() -> None:
    """linux-libc-dev, which the build needs anyway."""
    macros = dict(re.findall(r"^#define\s+PCI_(\w+)\s+(0x[0-9a-fA-F]+)", HEADER.read_text(), re.MULTILINE))
    for ours, theirs in NAMES.items():
        assert getattr(pciregs, ours) == int(macros[theirs], 16), ours


@pytest.mark.parametrize(
    "control, expected, size",
    [
        (0x0000, (1, False, False, False), 12),
        (0x008B, (32, True, True, False), 16),
        (0x0104, (4, False, False, True), 20),
        (0x0180, (1, False, True, True), 24),
        (0xFE71, (1, True, False, False), 12),  # what is asked for, and reserved bits
    ],
)
def test_msi(control: int, expected: tuple[int, bool, bool, bool], size: int) -> None:
    space = bytes(0x50) + struct.pack("<BBH", 5, 0, control)
    found = pciregs.msi(reader(space), 0x50)
    assert (found, found.size) == (pciregs.MsiRegisters(*expected), size)


def test_msix() -> None:
    space = bytes(0x50) + struct.pack("<BBHII", 0x11, 0, 0xC7FF, 0x2004, 0x3005)
    assert pciregs.msix(reader(space), 0x50) == pciregs.MsixRegisters(2048, True, 4, 0x2000, 5, 0x3000)
    space = bytes(0x50) + struct.pack("<BBHII", 0x11, 0, 0x7800, 0xFFFF_FFF8, 0x0000_0007)
    assert pciregs.msix(reader(space), 0x50) == pciregs.MsixRegisters(1, False, 0, 0xFFFF_FFF8, 7, 0)


@pytest.mark.parametrize("vectors, size", [(1, 8), (63, 8), (64, 8), (65, 16), (128, 16), (129, 24), (2048, 256)])
def test_pending_bits_are_whole_quadwords(vectors: int, size: int) -> None:
    found = pciregs.MsixRegisters(vectors, False, 0, 0, 0, 0x8000)
    assert (found.table_size, found.pba_size) == (16 * vectors, size)
