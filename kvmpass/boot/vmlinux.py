"""A kernel as it was linked, a vmlinux: a file, or what is compressed in a bzImage.

It is the ELF file's own entry, ``startup_64`` of arch/x86/kernel/head_64.S, in the state in which the decompressor
enters it: 64-bit mode, an identity mapping of the memory that it is in, RSI points to ``boot_params``. What the
decompressor (arch/x86/boot/compressed) does besides is left out: it moves the kernel to a random address (KASLR), and
turns on page tables of five levels.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Generator
from contextlib import closing
from typing import BinaryIO, Protocol, Self

from kvmpass._dataclass import dataclass
from kvmpass.layout import GIB, MIB, Range

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01"  # 64-bit, little-endian
_EXECUTABLE, _X86_64 = 2, 62
_PT_LOAD = 1
_MOST_HEADERS = 64
_MOST_SIZE = GIB  # KERNEL_IMAGE_SIZE (arch/x86/include/asm/page_64_types.h)
_BANNER = b"Linux version "
_MOST_BANNER = 1024
_ZEROS = memoryview(bytes(64 << 10))  # written again and again: a file can name a GiB of them
FOUR_LEVELS = 1 << 46
"""Bytes of physical memory that a kernel reaches with page tables of four levels."""


class Content(Protocol):
    """An ELF file that is read once, from its beginning on."""

    @property
    def size(self) -> int:
        """Its bytes."""

    def pieces(self) -> Generator[memoryview]:
        """Yield them. A piece is valid until the next one is asked for. Raises ``OSError``."""

    def close(self) -> None:
        """Release it. Idempotent."""


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
    """Where its content begins."""
    size: int
    """Bytes of its content; the rest of ``place`` is zero."""

    def write(self, memory: Writes, at: int, piece: memoryview) -> None:
        """Write what ``piece``, which is found at ``at``, has of its content."""
        start, end = max(self.offset, at), min(self.offset + self.size, at + len(piece))
        if start < end:
            memory.write(self.place.start + start - self.offset, piece[start - at : end - at])

    def write_zeros(self, memory: Writes) -> None:
        """Write what follows its content."""
        for at in range(self.size, self.place.size, len(_ZEROS)):
            memory.write(self.place.start + at, _ZEROS[: self.place.size - at])


@dataclass(frozen=True, slots=True)
class Vmlinux:
    """What is loaded of a file, without its symbols."""

    content: memoryview
    """The contents of its segments."""
    segments: tuple[Segment, ...]
    """What is loaded, by address."""
    entry: int
    """The physical address of its entry point."""
    banner: str = ""
    """Its version, where it was read from a file: release, who has built it, number and time of the build."""

    @classmethod
    def read(cls, file: BinaryIO, size: int) -> Self:
        """Read from a file of ``size`` bytes what is loaded of it, and not its symbols.

        Raises ``ValueError`` with the reason, ``OSError``.
        """

        def read(at: int, size: int) -> bytes:
            file.seek(at)
            return file.read(size)

        entry, segments = _layout(read, size)
        start, end = segments[0].place.start, segments[-1].place.end
        if start < MIB or end - start > _MOST_SIZE:
            raise ValueError(f"no kernel is loaded at {Range(start, end - start)}")
        content, moved = bytearray(), list[Segment]()
        for segment in segments:
            moved.append(Segment(segment.place, len(content), segment.size))
            content += read(segment.offset, segment.size)
        if len(content) != sum(segment.size for segment in segments):
            raise ValueError("it became shorter while it was read")
        return cls(memoryview(content), tuple(moved), entry, _banner(content))

    @property
    def code(self) -> Range:
        """From its first segment to the end of its last one."""
        start = self.segments[0].place.start
        return Range(start, self.segments[-1].place.end - start)

    def write(self, memory: Writes) -> None:
        """Load it into guest memory."""
        for segment in self.segments:
            segment.write(memory, 0, self.content)
            segment.write_zeros(memory)


def load(content: Content, code: Range, memory: Writes) -> int:
    """Load an ELF file whose first segment is at the start of ``code``, and all of them inside.

    Returns its entry point. Raises ``ValueError`` with the reason, and ``OSError`` of reading it: then parts of
    ``code`` may have been written.
    """
    with closing(content.pieces()) as pieces:
        first = next(pieces, memoryview(b""))
        try:
            entry, segments = _layout(lambda at, size: first[at : at + size], content.size)
            if segments[0].place.start != code.start:
                raise ValueError(f"nothing is loaded at {code.start:#x}")
            if segments[-1].place.end > code.end:
                raise ValueError(f"the segment {segments[-1].place} is not in {code}")
        except ValueError:
            for _ in pieces:  # raises at the end if this is not what was written: the cause is another one then
                pass
            raise
        at = 0
        for piece in itertools.chain((first,), pieces):
            for segment in segments:
                segment.write(memory, at, piece)
            at += len(piece)
    for segment in segments:
        segment.write_zeros(memory)
    return entry


def _layout(read: Callable[[int, int], bytes | memoryview], size: int) -> tuple[int, tuple[Segment, ...]]:
    """Return entry point and segments, by address, of an ELF file of ``size`` bytes. Raises ``ValueError``."""
    header = read(0, _EHDR.size)
    if len(header) < _EHDR.size:
        raise ValueError("too short for an ELF file")
    ident, kind, machine, _, entry, table, _, _, _, each, count, *_ = _EHDR.unpack(header)
    if not ident.startswith(_IDENT) or kind != _EXECUTABLE or machine != _X86_64:
        raise ValueError("not an ELF program for x86-64")
    if each != _PHDR.size or not 0 < count <= _MOST_HEADERS or table + count * each > size:
        raise ValueError("the table of program headers is not in the file")
    segments: list[Segment] = []
    headers = read(table, count * each)
    if len(headers) != count * each:
        raise ValueError("it became shorter while it was read")
    for kind, _, offset, _, address, length, span, _ in _PHDR.iter_unpack(headers):
        if kind == _PT_LOAD and span:
            if length > span or offset + length > size:
                raise ValueError(f"the content of the segment at {address:#x} is not in the file")
            segments.append(Segment(Range(address, span), offset, length))
    segments.sort(key=lambda segment: segment.place)
    for before, after in itertools.pairwise(segments):
        if after.place.start < before.place.end:
            raise ValueError(f"the segments {before.place} and {after.place} overlap")
    if not any(segment.place.start <= entry < segment.place.start + segment.size for segment in segments):
        raise ValueError(f"the entry point {entry:#x} is in no segment")
    return entry, tuple(segments)


def _banner(content: bytearray) -> str:
    """Return ``linux_banner`` (init/version-timestamp.c) without its first words; empty if there is none."""
    at = content.find(_BANNER)
    text = bytes(content[at + len(_BANNER) : at + _MOST_BANNER]) if at >= 0 else b""
    return text.partition(b"\0")[0].partition(b"\n")[0].decode("latin-1")
