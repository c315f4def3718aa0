"""What of an assigned function's capabilities its guest sees: nothing of a hidden one, the rest where it was."""

from __future__ import annotations

import struct

import pytest
from support import config_spaces

from kvmpass import pciregs
from kvmpass.pci import capabilities
from kvmpass.pci.configspace import ConfigSpace

POWER, AGP, VPD, SLOT, MSI, VENDOR, EXPRESS, MSIX, SATA, AF, EA = (
    0x01, 0x02, 0x03, 0x04, 0x05, 0x09, 0x10, 0x11, 0x12, 0x13, 0x14,
)  # fmt: skip
SHOWN = {POWER, VPD, MSI, VENDOR, EXPRESS, MSIX, SATA, AF}
SHOWN_EXTENDED = {0x0001, 0x0003, 0x0004, 0x000B, 0x0023}


class Device:
    """Configuration space as bytes; what is written is kept."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def read_int(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.read(offset, size), "little")


class Guest:
    """What a guest sees of ``chain`` (offset and identifier, in the list's order) over bytes that are all 0xEE."""

    def __init__(self, chain: list[tuple[int, int]], absent: frozenset[int] = frozenset()) -> None:
        data = bytearray(b"\xee" * 256)
        data[0x06:0x08] = b"\x10\0"
        data[0x34] = chain[0][0] if chain else 0
        for (at, number), (following, _) in zip(chain, [*chain[1:], (0, 0)], strict=False):
            data[at : at + 2] = bytes([number, following])
        self.device = Device(data)
        self.space = ConfigSpace(self.device)
        self.found = pciregs.capabilities(self.device.read_int)
        assert [(c.offset, c.id) for c in self.found] == chain
        self.shown = capabilities.link(self.space, self.found, absent)

    def int(self, offset: int, size: int) -> int:
        return int.from_bytes(self.space.read(offset, size), "little")

    def chain(self) -> list[tuple[int, int]]:
        return [(c.offset, c.id) for c in pciregs.capabilities(self.int)]


def test_known_ones_are_shown_in_their_order_and_all_others_hidden() -> None:
    """Every identifier that a byte can hold, a few at a time."""
    for first in range(1, 256, 11):
        numbers = list(range(first, min(first + 11, 256)))
        chain = [(0x40 + 16 * at, n) for at, n in enumerate(numbers)]
        guest = Guest(chain)
        assert guest.chain() == [(at, n) for at, n in chain if n in SHOWN]
        assert not guest.shown or guest.space.read(guest.chain()[-1][0] + 1, 1) == b"\0", "the last one says so"
        assert guest.shown == {n: at for at, n in chain if n in SHOWN}
        for at, number in chain:
            body = guest.space.read(at, 16)
            assert body[2:] == (b"\xee" * 14 if number in SHOWN else bytes(14)), f"registers of {number:#x}"
            assert body[0] == (number if number in SHOWN else 0)


def test_registers_of_a_hidden_one_are_zero_up_to_the_next_and_cannot_be_written() -> None:
    """From its first byte to its last, wherever in the list it stands."""
    chain = [(0x80, EA), (0x40, POWER), (0xC4, SLOT), (0x60, VPD), (0xF8, AGP)]
    guest = Guest(chain)
    assert guest.chain() == [(0x40, POWER), (0x60, VPD)]
    for start, end, hidden in (
        (0x40, 0x60, False), (0x60, 0x80, False), (0x80, 0xC4, True), (0xC4, 0xF8, True), (0xF8, 0x100, True),
    ):  # fmt: skip
        for at in range(start + 2, end):
            assert guest.space.read(at, 1) == (b"\0" if hidden else b"\xee"), hex(at)
            guest.space.write(at, b"\x5a")
            assert guest.device.data[at] == (0xEE if hidden else 0x5A), hex(at)
            assert guest.space.read(at, 1) == (b"\0" if hidden else b"\x5a"), hex(at)


def test_the_pointers_of_shown_ones_are_emulated() -> None:
    guest = Guest([(0x40, POWER), (0x60, EA), (0x80, VPD)])
    before = bytes(guest.device.data)
    for at in (0x34, 0x40, 0x41, 0x80, 0x81):
        guest.space.write(at, b"\xff")
    assert guest.chain() == [(0x40, POWER), (0x80, VPD)]
    assert bytes(guest.device.data) == before


def test_nothing_shown_is_an_empty_list() -> None:
    for chain in ([], [(0x40, EA)], [(0x40, EA), (0x80, AGP)]):
        guest = Guest(chain)
        assert guest.space.read(0x34, 1) == b"\0"
        assert (guest.chain(), guest.shown) == ([], {})


def test_what_the_function_cannot_have_is_hidden() -> None:
    """MSI without interrupts in VFIO, for one."""
    guest = Guest([(0x40, MSI), (0x60, POWER), (0x80, MSIX)], frozenset({MSI, MSIX}))
    assert guest.chain() == [(0x60, POWER)]
    assert guest.space.read(0x40, 32) == bytes(32) == guest.space.read(0x80, 32)


def test_the_second_of_a_kind_is_hidden_but_not_a_vendors() -> None:
    """Of two MSI-X capabilities only the first can be ours; a vendor may have as many as it likes."""
    guest = Guest([(0x40, VENDOR), (0x50, MSIX), (0x60, VENDOR), (0x70, MSIX), (0x80, POWER), (0x90, POWER)])
    assert guest.chain() == [(0x40, VENDOR), (0x50, MSIX), (0x60, VENDOR), (0x80, POWER)]
    assert guest.shown == {VENDOR: 0x40, MSIX: 0x50, POWER: 0x80}
    assert guest.space.read(0x70, 16) == bytes(16) == guest.space.read(0x90, 16)


# --- from 0x100 on


class Extended:
    """What a guest sees of extended capabilities: offset, identifier, version, in the list's order."""

    def __init__(self, chain: list[tuple[int, int, int]], size: int = 4096) -> None:
        data = bytearray(b"\xee" * size)
        data[0x100:0x104] = bytes(4)[: size - 0x100]
        for (at, number, version), (following, *_) in zip(chain, [*chain[1:], (0, 0, 0)], strict=False):
            struct.pack_into("<I", data, at, number | version << 16 | following << 20)
        self.device = Device(data)
        self.space = ConfigSpace(self.device)
        found = pciregs.extended_capabilities(self.device.read_int) if size > 256 else []
        assert [(c.offset, c.id, c.version) for c in found] == chain
        capabilities.link_extended(self.space, found)

    def int(self, offset: int, size: int) -> int:
        return int.from_bytes(self.space.read(offset, size), "little")

    def chain(self) -> list[tuple[int, int, int]]:
        return [(c.offset, c.id, c.version) for c in pciregs.extended_capabilities(self.int)]


def test_extended_ones_that_are_known_are_shown() -> None:
    """Every identifier up to 0x40, and a few that are not assigned."""
    numbers = [*range(0x01, 0x40), 0x100, 0x0123, 0xFFFF]
    chain = [(0x100 + 0x20 * at, n, 1 + n % 3) for at, n in enumerate(numbers)]
    guest = Extended(chain)
    assert guest.chain() == [entry for entry in chain if entry[1] in SHOWN_EXTENDED]
    assert guest.int(guest.chain()[-1][0], 4) >> 20 == 0, "the last one says so"
    for at, number, _ in chain[:-1]:
        expected = b"\xee" * 28 if number in SHOWN_EXTENDED else bytes(28)
        assert guest.space.read(at + 4, 28) == expected, f"registers of {number:#x}"


def test_a_hidden_one_in_the_middle_is_blank() -> None:
    chain = [(0x100, 0x0001, 2), (0x140, 0x0010, 1), (0x200, 0x0003, 1), (0x20C, 0x000F, 1)]
    guest = Extended(chain)
    assert guest.chain() == [(0x100, 0x0001, 2), (0x200, 0x0003, 1)]
    assert guest.space.read(0x140, 0xC0) == bytes(0xC0)
    assert guest.space.read(0x20C, 0x1000 - 0x20C) == bytes(0x1000 - 0x20C)
    assert guest.space.read(0x104, 0x3C) == b"\xee" * 0x3C
    for at in (0x144, 0x1FF, 0x20C, 0xFFF):
        guest.space.write(at, b"\x5a")
        assert guest.device.data[at] != 0x5A and guest.space.read(at, 1) == b"\0"
    guest.space.write(0x103, b"\x5a")
    guest.space.write(0x104, b"\x5a")
    assert (guest.device.data[0x103], guest.device.data[0x104]) != (0x5A, 0x5A)
    assert guest.chain() == [(0x100, 0x0001, 2), (0x200, 0x0003, 1)]


def test_a_null_capability_replaces_a_hidden_first_one() -> None:
    """The list begins at 0x100: there must be something with a version and a pointer."""
    guest = Extended([(0x100, 0x000E, 1), (0x140, 0x0003, 1), (0x150, 0x000D, 1)])
    assert guest.chain() == [(0x100, 0, 1), (0x140, 0x0003, 1)]
    assert guest.space.read(0x104, 0x3C) == bytes(0x3C)
    assert guest.space.read(0x144, 12) == b"\xee" * 12


@pytest.mark.parametrize("chain", [[], [(0x100, 0x000E, 1)], [(0x100, 0x000E, 1), (0x140, 0x0010, 1)]])
def test_without_any_the_list_is_empty(chain: list[tuple[int, int, int]]) -> None:
    guest = Extended(chain)
    assert guest.space.read(0x100, 4) == bytes(4)
    guest.space.write(0x100, b"\xff" * 4)
    assert guest.space.read(0x100, 4) == bytes(4)
    assert guest.device.data[0x100:0x104] != b"\xff" * 4


def test_a_device_of_256_bytes_has_none() -> None:
    guest = Extended([], size=256)
    assert guest.space.read(0x100, 0xF00) == bytes(0xF00)
    assert guest.space.read(0x40, 16) == b"\xee" * 16


# --- PCI Express on a root bus: without a link (PCI Express base, section 7.5.3)


def express(flags: int, at: int = 0x60) -> Guest:
    guest = Guest([(at, EXPRESS)])
    struct.pack_into("<H", guest.device.data, at + 2, flags)
    capabilities.unlink_express(guest.space, at)
    return guest


@pytest.mark.parametrize("kind", [0x00, 0x10])
def test_endpoints_become_integrated_ones(kind: int) -> None:
    guest = express(kind | 2)
    assert guest.int(0x62, 2) == 0x0092
    zeroes = {*range(0x0C, 0x14), *range(0x2C, 0x34)}
    for offset in range(4, 0x3C):
        expected = b"\0" if offset in zeroes else b"\xee"
        assert guest.space.read(0x60 + offset, 1) == expected, f"+{offset:#x}"
    assert express(0x3E00 | kind | 2).int(0x62, 2) == 0x3E92, "the message number stays"


@pytest.mark.parametrize("version", range(16))
def test_the_first_version_has_no_second_link_registers(version: int) -> None:
    """There another capability may lie."""
    guest = express(version)
    assert guest.int(0x62, 2) == 0x0090 | version
    assert guest.space.read(0x6C, 8) == bytes(8)
    assert guest.space.read(0x60 + 0x2C, 8) == (bytes(8) if version >= 2 else b"\xee" * 8)


@pytest.mark.parametrize("kind", [0x40, 0x90, 0xA0])
def test_other_types_are_unchanged(kind: int) -> None:
    guest = express(kind | 2)
    assert guest.int(0x62, 2) == kind | 2
    assert guest.space.read(0x6C, 8) == b"\xee" * 8
    guest.space.write(0x62, b"\0\0")
    assert guest.int(0x62, 2) == kind | 2, "it cannot be written"


@pytest.mark.parametrize("at", [0xC4, 0xCC, 0xD0, 0xEC, 0xF0, 0xF8])
def test_a_capability_that_does_not_fit_changes_nothing_behind_it(at: int) -> None:
    """The space has 256 bytes; link registers that would lie beyond do not exist."""
    guest = express(0x0002, at)
    assert guest.int(at + 2, 2) == 0x0092
    assert guest.space.read(0x100, 64) == bytes(64)
    for first in (0x0C, 0x2C):
        for offset in range(at + first, min(at + first + 8, 0x100)):
            whole = at + first + 8 <= 0x100
            assert guest.space.read(offset, 1) == (b"\0" if whole else b"\xee"), hex(offset)


# --- recorded devices


def test_what_a_guest_sees_of_recorded_devices() -> None:
    """SR-IOV, ARI, ACS and virtual channels of these stay the host's."""
    for data, shown, extended in (
        (config_spaces.IGB, [POWER, MSI, MSIX, EXPRESS], [0x0001]),
        (config_spaces.NVME, [MSIX, EXPRESS, POWER], []),
    ):
        device = Device(data)
        space = ConfigSpace(device)
        capabilities.link(space, pciregs.capabilities(device.read_int))
        capabilities.link_extended(space, pciregs.extended_capabilities(device.read_int))

        def read(offset: int, size: int, space: ConfigSpace = space) -> int:
            return int.from_bytes(space.read(offset, size), "little")

        assert [c.id for c in pciregs.capabilities(read)] == shown
        assert [c.id for c in pciregs.extended_capabilities(read)] == extended


# --- registers that do not fit are hidden with their capability


@pytest.mark.parametrize(
    "number, control, size",
    [
        (POWER, 0, 8),
        (MSIX, 0, 12),
        (EXPRESS, 0x0090, 4),
        (MSI, 0x0000, 12),
        (MSI, 0x0080, 16),
        (MSI, 0x0100, 20),
        (MSI, 0x0180, 24),
        (VENDOR, 0, 4),
        (SATA, 0, 4),
    ],
)
def test_a_capability_needs_room_for_its_registers(number: int, control: int, size: int) -> None:
    """Up to the next one, or to the end of the 256 bytes; MSI's depends on its control word (figure 6-9)."""
    for end in (0x100, 0xC0):
        for room in (size - 4, size, size + 4):
            if not room:
                continue
            at = end - room
            chain = [(at, number)] if end == 0x100 else [(at, number), (end, AF)]
            data = bytearray(b"\xee" * 256)
            data[0x06:0x08], data[0x34] = b"\x10\0", at
            for (place, id_), (following, _) in zip(chain, [*chain[1:], (0, 0)], strict=False):
                data[place : place + 2] = bytes([id_, following])
            struct.pack_into("<H", data, at + 2, control)
            device = Device(data)
            space = ConfigSpace(device)
            shown = capabilities.link(space, pciregs.capabilities(device.read_int))
            assert (number in shown) == (room >= size), (hex(end), room)
            if number not in shown:
                assert space.read(at, room) == bytes(room)
