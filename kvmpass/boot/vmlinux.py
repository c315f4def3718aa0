"""The kernel that is compressed in a bzImage: a vmlinux, which is entered without decompressing itself.

It is the ELF file's own entry, ``startup_64`` of arch/x86/kernel/head_64.S, in the state in which the decompressor
enters it: 64-bit mode, an identity mapping of the memory that it is in, RSI points to ``boot_params``. What the
decompressor (arch/x86/boot/compressed) does besides is left out: it moves the kernel to a random address (KASLR), and
turns on page tables of five levels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol, Self

from kvmpass._cache import PIECE, drop_pages
from kvmpass._dataclass import dataclass
from kvmpass.layout import Range

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01"  # 64-bit, little-endian
_EXECUTABLE, _X86_64 = 2, 62
_PT_LOAD = 1
_MOST_HEADERS = 64
FOUR_LEVELS = 1 << 46
"""Bytes of physical memory that a kernel reaches with page tables of four levels."""


class Writes(Protocol):
    """Guest memory for loading."""

    def write(self, gpa: int, data: bytes | memoryview, /) -> object:
        """Write ``data`` to ``gpa``. Raises for addresses outside RAM."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the kernel, at its physical address."""

    place: Range
    """Where it is in guest memory."""
    offset: int
    """Where its content begins in the file."""
    size: int
    """Bytes of the file; the rest of ``place`` is zero."""


@dataclass(frozen=True, slots=True)
class Vmlinux:
    """An ELF file of a kernel that can be loaded where it was linked to."""

    content: memoryview
    """The file."""
    segments: tuple[Segment, ...]
    """What is loaded, by address."""
    entry: int
    """The physical address of its entry point."""

    @classmethod
    def parse(cls, content: memoryview, code: Range) -> Self:
        """Check and parse a file whose first segment is at the start of ``code``, and all of them inside.

        Raises ``ValueError`` with the reason.
        """
        if len(content) < _EHDR.size:
            raise ValueError("too short for an ELF file")
        ident, kind, machine, _, entry, table, _, _, _, each, count, *_ = _EHDR.unpack_from(content)
        if not ident.startswith(_IDENT) or kind != _EXECUTABLE or machine != _X86_64:
            raise ValueError("not an ELF program for x86-64")
        if each != _PHDR.size or not 0 < count <= _MOST_HEADERS or table + count * each > len(content):
            raise ValueError("the table of program headers is not in the file")
        segments = tuple(sorted(_segments(content, table, count), key=lambda segment: segment.place))
        if not segments or segments[0].place.start != code.start:
            raise ValueError(f"nothing is loaded at {code.start:#x}")
        end = code.start
        for segment in segments:
            if segment.place.start < end or not code.contains(segment.place):
                raise ValueError(f"the segment {segment.place} overlaps another one, or is not in {code}")
            end = segment.place.end
        if not any(segment.place.start <= entry < segment.place.start + segment.size for segment in segments):
            raise ValueError(f"the entry point {entry:#x} is in no segment")
        return cls(content, segments, entry)

    def write(self, memory: Writes) -> None:
        """Load it into guest memory."""
        for segment in self.segments:
            start = segment.place.start
            for at in range(0, segment.size, PIECE):
                size = min(PIECE, segment.size - at)
                memory.write(start + at, self.content[segment.offset + at : segment.offset + at + size])
                drop_pages(self.content)
            if zeros := segment.place.size - segment.size:
                memory.write(start + segment.size, bytes(zeros))


def _segments(content: memoryview, table: int, count: int) -> Iterator[Segment]:
    for index in range(count):
        kind, _, offset, _, address, size, span, _ = _PHDR.unpack_from(content, table + index * _PHDR.size)
        if kind == _PT_LOAD and span:
            if size > span or offset + size > len(content):
                raise ValueError(f"the content of the segment at {address:#x} is not in the file")
            yield Segment(Range(address, span), offset, size)
