"""Configuration space: register offsets (PCI Local Bus 3.0, section 6.1), lists of capabilities, MSI and MSI-X."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvmpass._dataclass import dataclass

COMMAND = 0x04
STATUS = 0x06
REVISION = 0x08  # and the class code, in the three bytes after it
HEADER_TYPE = 0x0E
BAR0 = 0x10
SUBSYSTEM = 0x2C
ROM = 0x30
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
HEADER_SIZE = 0x40
CONVENTIONAL_SIZE = 0x100
EXTENDED_SIZE = 0x1000
BARS = 6

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_DECODING = COMMAND_IO | COMMAND_MEMORY
STATUS_CAPABILITIES = 1 << 4
MULTIFUNCTION = 1 << 7

# Capability identifiers (PCI Code and ID Assignment Specification, section 2).
CAP_POWER = 0x01
CAP_VPD = 0x03
CAP_MSI = 0x05
CAP_VENDOR = 0x09
CAP_EXPRESS = 0x10
CAP_MSIX = 0x11
CAP_SATA = 0x12
CAP_ADVANCED_FEATURES = 0x13

# Extended capability identifiers (the same, section 3).
EXT_AER = 0x0001
EXT_SERIAL_NUMBER = 0x0003
EXT_POWER_BUDGETING = 0x0004
EXT_VENDOR = 0x000B
EXT_ACS = 0x000D
EXT_ATS = 0x000F
EXT_SRIOV = 0x0010
EXT_PRI = 0x0013
EXT_PASID = 0x001B
EXT_DESIGNATED_VENDOR = 0x0023

# Message control (PCI Local Bus 3.0, sections 6.8.1.3 and 6.8.2.3; include/uapi/linux/pci_regs.h).
MSI_ENABLE = 1 << 0
MSI_MULTIPLE_CAPABLE_SHIFT = 1
MSI_MULTIPLE_ENABLE_SHIFT = 4
MSI_64BIT = 1 << 7
MSI_MASKABLE = 1 << 8
MSIX_ENABLE = 1 << 15
MSIX_MASK_ALL = 1 << 14
MSIX_ENTRY_SIZE = 16  # bytes of a vector in the table
_MSIX_SIZE, _MSIX_BAR = 0x7FF, 0b111

Read = Callable[[int, int], int]
"""Reads a register: offset, bytes."""


@dataclass(frozen=True, slots=True)
class Capability:
    """An entry of the list of capabilities."""

    id: int
    """``CAP_…``, or ``EXT_…`` of an extended capability."""
    offset: int
    """Where it begins."""
    end: int
    """Where the next capability begins, or the space ends."""
    version: int = 0
    """Of an extended capability."""


def capabilities(read: Read) -> list[Capability]:
    """Walk the list with ``read``. A loop, or a pointer into the header, ends it."""
    found: dict[int, int] = {}  # identifiers by offset
    if not read(STATUS, 2) & STATUS_CAPABILITIES:
        return []
    offset = read(CAPABILITIES, 1) & ~3
    while HEADER_SIZE <= offset < CONVENTIONAL_SIZE and offset not in found:
        entry = read(offset, 2)
        found[offset] = entry & 0xFF
        offset = entry >> 8 & ~3
    return [Capability(number, at, _end(at, found, CONVENTIONAL_SIZE)) for at, number in found.items()]


def extended_capabilities(read: Read) -> list[Capability]:
    """Walk the list from 0x100 on with ``read`` (PCI Express base, section 7.6.3). It may be empty."""
    found: dict[int, int] = {}  # headers by offset
    offset = CONVENTIONAL_SIZE
    while CONVENTIONAL_SIZE <= offset < EXTENDED_SIZE and offset not in found:
        header = read(offset, 4)
        if header in (0, 0xFFFF_FFFF):
            break
        found[offset] = header
        offset = header >> 20 & ~3
    ends = ((at, header, _end(at, found, EXTENDED_SIZE)) for at, header in found.items())
    return [Capability(header & 0xFFFF, at, end, header >> 16 & 0xF) for at, header, end in ends]


def _end(offset: int, found: Iterable[int], limit: int) -> int:
    return min((at for at in found if at > offset), default=limit)


@dataclass(frozen=True, slots=True)
class MsiRegisters:
    """The MSI capability's message control."""

    vectors: int
    """A power of two up to 32."""
    enabled: bool
    """Whether MSI is enabled."""
    address64: bool
    """Whether the address has 64 bits."""
    maskable: bool
    """Whether there are mask and pending bits."""

    @property
    def size(self) -> int:
        """Bytes of the capability."""
        return 12 + 4 * self.address64 + 8 * self.maskable


def msi(read: Read, at: int) -> MsiRegisters:
    """Read the MSI capability at ``at`` (PCI Local Bus 3.0, section 6.8.1)."""
    control = read(at + 2, 2)
    vectors = 1 << (control >> MSI_MULTIPLE_CAPABLE_SHIFT & 7)
    flags = (bool(control & bit) for bit in (MSI_ENABLE, MSI_64BIT, MSI_MASKABLE))
    return MsiRegisters(vectors, *flags)


@dataclass(frozen=True, slots=True)
class MsixRegisters:
    """The MSI-X capability's registers."""

    vectors: int
    """Number of vectors, 1 to 2048."""
    enabled: bool
    """Whether MSI-X is enabled."""
    table_bar: int
    """Number of the BAR with the table."""
    table_offset: int
    """Where the table is in that BAR."""
    pba_bar: int
    """Number of the BAR with the pending bits."""
    pba_offset: int
    """Where they are in that BAR."""

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return MSIX_ENTRY_SIZE * self.vectors

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits, in whole quadwords."""
        return -(-self.vectors // 64) * 8


def msix(read: Read, at: int) -> MsixRegisters:
    """Read the MSI-X capability at ``at`` (PCI Local Bus 3.0, section 6.8.2)."""
    control, table, pending = read(at + 2, 2), read(at + 4, 4), read(at + 8, 4)
    places = (table & _MSIX_BAR, table & ~_MSIX_BAR, pending & _MSIX_BAR, pending & ~_MSIX_BAR)
    return MsixRegisters((control & _MSIX_SIZE) + 1, bool(control & MSIX_ENABLE), *places)
