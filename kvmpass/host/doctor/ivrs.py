"""The ACPI table IVRS: which IOMMUs the firmware describes, and which memory it wants direct-mapped.

Sources: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 5.2; what Linux makes of it:
drivers/iommu/amd/init.c (check_ivrs_checksum, get_highest_supported_ivhd_type, init_unity_map_range).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvmpass.errors import KvmpassError
from kvmpass.layout import PAGE, Range

_HEADER = 48  # ACPI's 36 bytes, IVinfo, 8 reserved
_IVHD_TYPES = (0x10, 0x11, 0x40)
_IVHD_SIZE = 24
_IVMD_ALL, _IVMD_ONE, _IVMD_RANGE = 0x20, 0x21, 0x22
_IVMD_SIZE = 32
_UNITY, _READ, _WRITE, _EXCLUSION = 1 << 0, 1 << 1, 1 << 2, 1 << 3


class BadTable(KvmpassError):
    """The bytes are no IVRS."""


@dataclass(frozen=True, slots=True)
class Iommu:
    """An IVHD block: ``device_id`` is the IOMMU's own bus, device and function, ``base`` its registers' address."""

    type: int
    device_id: int
    base: int
    segment: int = 0


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """An IVMD block as it stands: memory that ``first`` to ``last`` (device identifiers) find at its own address.

    ``start`` and ``length`` are in bytes, and neither need be of whole pages; ``flags`` as in the specification.
    """

    start: int
    length: int
    first: int
    last: int
    flags: int
    segment: int = 0

    @property
    def direct(self) -> bool:
        """Whether the kernel maps it one to one, and calls it ``direct``. It ignores a block with neither flag.

        Exclusion ranges are read-write unity maps since Linux 5.5; before, the IOMMU did not translate them.
        """
        return bool(self.flags & (_UNITY | _EXCLUSION))

    @property
    def range(self) -> Range:
        """What the kernel makes of it: whole pages. Nothing where the length is 0."""
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
    """What is of interest here, block by block. ``damage`` says which block could not be read, None if all could.

    ``sum_is_right``: all bytes add up to 0; Linux does without the IOMMU where they do not.
    """

    iommus: tuple[Iommu, ...]
    memory: tuple[MemoryBlock, ...]
    sum_is_right: bool = True
    damage: str | None = None

    @property
    def direct(self) -> tuple[MemoryBlock, ...]:
        """The IVMD blocks that the kernel maps one to one."""
        return tuple(block for block in self.memory if block.direct)

    @property
    def used_type(self) -> int | None:
        """The type of IVHD that Linux reads: the highest that it knows, of the first IOMMU's blocks."""
        first = next(iter(self.iommus), None)
        known = [one.type for one in self.iommus if first and one.device_id == first.device_id]
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
    """Read a whole table. Raises ``BadTable`` where not even its first block can be read."""
    if len(data) < _HEADER or data[:4] != b"IVRS":
        raise BadTable(f"{len(data)} bytes that do not begin as an IVRS does")
    end = struct.unpack_from("<I", data, 4)[0]
    if not _HEADER <= end <= len(data):
        raise BadTable(f"the table says that it has {end} bytes, {len(data)} are there")
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
