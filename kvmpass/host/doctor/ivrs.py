"""The ACPI table IVRS: the IOMMUs that the firmware describes, and the memory that it wants direct-mapped.

Sources: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 5.2; how Linux reads it:
drivers/iommu/amd/init.c (check_ivrs_checksum, get_highest_supported_ivhd_type, init_unity_map_range).
"""

from __future__ import annotations

import struct

from kvmpass._dataclass import dataclass
from kvmpass.errors import KvmpassError
from kvmpass.layout import PAGE, Range

_HEADER = 48  # ACPI's 36 bytes, IVinfo, 8 reserved
_IVHD_TYPES = (0x10, 0x11, 0x40)
_IVHD_SIZE = 24
_IVMD_ALL, _IVMD_ONE, _IVMD_RANGE = 0x20, 0x21, 0x22
_IVMD_SIZE = 32
_UNITY, _READ, _WRITE, _EXCLUSION = 1 << 0, 1 << 1, 1 << 2, 1 << 3


class BadTable(KvmpassError):
    """The data is not a valid IVRS."""


@dataclass(frozen=True, slots=True)
class Iommu:
    """An IVHD block."""

    type: int
    """0x10, 0x11 or 0x40."""
    device_id: int
    """Bus, device and function of the IOMMU, 16 bits."""
    base: int
    """Physical address of its registers."""
    segment: int = 0
    """Its PCI segment."""


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """An IVMD block: memory that devices must find at its own address."""

    start: int
    """Physical address in bytes; need not be page-aligned."""
    length: int
    """Bytes; need not be a multiple of a page."""
    first: int
    """The first device ID, 16 bits."""
    last: int
    """The last device ID, inclusive."""
    flags: int
    """Bits 0 to 3: unity map, read, write, exclusion range."""
    segment: int = 0
    """The PCI segment of the devices."""

    @property
    def direct(self) -> bool:
        """Whether the kernel direct-maps it, as a reserved region of type ``direct``; it ignores other blocks.

        Exclusion ranges are read-write unity maps since Linux 5.5; before, the IOMMU did not translate them.
        """
        return bool(self.flags & (_UNITY | _EXCLUSION))

    @property
    def range(self) -> Range:
        """The range that the kernel maps: whole pages; empty if the length is 0."""
        return Range(-(-self.start // PAGE) * PAGE, -(-self.length // PAGE) * PAGE)

    @property
    def _who(self) -> str:
        segment = f"segment {self.segment:04x} " if self.segment else ""
        if (self.first, self.last) == (0, 0xFFFF):
            return f"all devices of {segment.strip()}" if segment else "all devices"
        if self.first == self.last:
            return segment + _text(self.first)
        return f"{segment}{_text(self.first)} to {_text(self.last)}"

    @property
    def _access(self) -> str:
        if not self.direct:
            return ", ignored by Linux"
        if self.flags & _EXCLUSION:
            return ", exclusion range: read-write since Linux 5.5"
        return {_READ | _WRITE: "", _READ: ", read-only", _WRITE: ", write-only", 0: ", no access"}[
            self.flags & (_READ | _WRITE)
        ]

    def __str__(self) -> str:
        return f"{Range(self.start, self.length)} for {self._who}{self._access}"


@dataclass(frozen=True, slots=True)
class Ivrs:
    """The IVHD and IVMD blocks of a table."""

    iommus: tuple[Iommu, ...]
    """The IVHD blocks, in their order."""
    memory: tuple[MemoryBlock, ...]
    """The IVMD blocks, in their order."""
    sum_is_right: bool = True
    """Whether all bytes add up to 0; if not, Linux does not use the IOMMU."""
    damage: str | None = None
    """Which block is invalid; None if none is."""

    @property
    def direct(self) -> tuple[MemoryBlock, ...]:
        """The IVMD blocks that the kernel direct-maps."""
        return tuple(block for block in self.memory if block.direct)

    @property
    def used_type(self) -> int | None:
        """The type of IVHD that Linux uses: the highest that it supports, of the first IOMMU's blocks."""
        first = next(iter(self.iommus), None)
        known = [iommu.type for iommu in self.iommus if first and iommu.device_id == first.device_id]
        return max(known, default=None)

    def __str__(self) -> str:
        types = sorted({iommu.type for iommu in self.iommus})
        kinds = f" (types {', '.join(f'{kind:x}h' for kind in types)}; {self.used_type:x}h is used)" if types else ""
        text = f"{len(self.iommus)} IVHD{kinds}, {len(self.memory)} IVMD"
        if not self.sum_is_right:
            text += ", wrong checksum"
        return text + (f", {self.damage}" if self.damage else "")


def _text(device_id: int) -> str:
    return f"{device_id >> 8:02x}:{device_id >> 3 & 0x1F:02x}.{device_id & 7}"


def parse_ivrs(data: bytes) -> Ivrs:
    """Parse a whole table. Raises ``BadTable`` if the header or the first block is invalid."""
    if len(data) < _HEADER or data[:4] != b"IVRS":
        raise BadTable(f"{len(data)} bytes without the header of an IVRS")
    end = struct.unpack_from("<I", data, 4)[0]
    if not _HEADER <= end <= len(data):
        raise BadTable(f"the table has a length of {end} bytes, {len(data)} are present")
    iommus: list[Iommu] = []
    memory: list[MemoryBlock] = []
    at = _HEADER
    damage = None
    while at + 4 <= end:
        kind, flags, size = struct.unpack_from("<BBH", data, at)
        if size < 4 or at + size > end:
            damage = f"the block at {at:#x} (type {kind:#x}) has an impossible size, {size}"
            if not (iommus or memory):
                raise BadTable(damage)
            break
        if kind in _IVHD_TYPES and size >= _IVHD_SIZE:
            device_id, _, base, segment = struct.unpack_from("<HHQH", data, at + 4)
            iommus.append(Iommu(kind, device_id, base, segment))
        elif kind in (_IVMD_ALL, _IVMD_ONE, _IVMD_RANGE) and size >= _IVMD_SIZE:
            first, last, segment = struct.unpack_from("<HHH", data, at + 4)
            if kind == _IVMD_ALL:
                first, last = 0, 0xFFFF
            elif kind == _IVMD_ONE:
                last = first
            start, length = struct.unpack_from("<QQ", data, at + 16)
            memory.append(MemoryBlock(start, length, first, last, flags, segment))
        elif kind in (*_IVHD_TYPES, _IVMD_ALL, _IVMD_ONE, _IVMD_RANGE):
            damage = damage or f"the block at {at:#x} (type {kind:#x}) is too short, {size} bytes"
        at += size
    return Ivrs(tuple(iommus), tuple(memory), sum(data[:end]) % 256 == 0, damage)
