"""The ACPI table IVRS: which IOMMUs the firmware describes, and which memory it wants mapped one to one.

Source: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, section 5.2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvmpass.errors import KvmpassError
from kvmpass.layout import Range

_HEADER = 48  # ACPI's 36 bytes, IVinfo, 8 reserved
_IVHD_TYPES = (0x10, 0x11, 0x40)
_IVHD_SIZE = 24
_IVMD_ALL, _IVMD_ONE, _IVMD_RANGE = 0x20, 0x21, 0x22
_IVMD_SIZE = 32
_EXCLUSION = 1 << 3


class BadTable(KvmpassError):
    """The bytes are no IVRS."""


@dataclass(frozen=True, slots=True)
class Iommu:
    """An IVHD block: ``device_id`` is the IOMMU's own bus, device and function, ``base`` its registers' address."""

    type: int
    device_id: int
    base: int


@dataclass(frozen=True, slots=True)
class OneToOne:
    """An IVMD block: memory that ``first`` to ``last`` (device identifiers) must find at its own address."""

    range: Range
    first: int
    last: int

    def __str__(self) -> str:
        if (self.first, self.last) == (0, 0xFFFF):
            who = "all devices"
        elif self.first == self.last:
            who = _text(self.first)
        else:
            who = f"{_text(self.first)} to {_text(self.last)}"
        return f"{self.range} for {who}"


@dataclass(frozen=True, slots=True)
class Ivrs:
    """What is of interest here; exclusion ranges are not translated, and appear as reserved."""

    iommus: tuple[Iommu, ...]
    one_to_one: tuple[OneToOne, ...]


def _text(device_id: int) -> str:
    return f"{device_id >> 8:02x}:{device_id >> 3 & 0x1F:02x}.{device_id & 7}"


def parse_ivrs(data: bytes) -> Ivrs:
    """Read a whole table. Raises ``BadTable``."""
    if len(data) < _HEADER or data[:4] != b"IVRS":
        raise BadTable(f"{len(data)} bytes that do not begin as an IVRS does")
    end = struct.unpack_from("<I", data, 4)[0]
    if not _HEADER <= end <= len(data):
        raise BadTable(f"the table says that it has {end} bytes, {len(data)} are there")
    iommus: list[Iommu] = []
    one_to_one: list[OneToOne] = []
    at = _HEADER
    while at + 4 <= end:
        kind, flags, size = struct.unpack_from("<BBH", data, at)
        if size < 4 or at + size > end:
            raise BadTable(f"the block at {at:#x} (type {kind:#x}) has an impossible size, {size}")
        if kind in _IVHD_TYPES and size >= _IVHD_SIZE:
            device_id, _, base = struct.unpack_from("<HHQ", data, at + 4)
            iommus.append(Iommu(kind, device_id, base))
        elif kind in (_IVMD_ALL, _IVMD_ONE, _IVMD_RANGE) and size >= _IVMD_SIZE and not flags & _EXCLUSION:
            first, last = struct.unpack_from("<HH", data, at + 4)
            if kind == _IVMD_ALL:
                first, last = 0, 0xFFFF
            elif kind == _IVMD_ONE:
                last = first
            one_to_one.append(OneToOne(Range(*struct.unpack_from("<QQ", data, at + 16)), first, last))
        at += size
    return Ivrs(tuple(iommus), tuple(one_to_one))
