"""An encoder of AML, the byte code of ACPI tables (ACPI 6.5, chapter 20; resources: section 6.4).

It has the terms that the DSDT needs. Each function returns the bytes of the term in its docstring, written as in ASL
(chapter 19); calls are nested as in ASL.
"""

from __future__ import annotations

import uuid
from functools import lru_cache
from typing import Final

_TERMS = 512  # a table repeats names and numbers: to encode each again took two fifths of the time
ZERO: Final = b"\x00"
ONE: Final = b"\x01"


@lru_cache(_TERMS)
def name_string(path: str) -> bytes:
    r"""Encode a NameString: optional ``\`` or ``^``, then segments of up to four characters."""
    prefix = ""
    while path and path[0] in "\\^":
        prefix, path = prefix + path[0], path[1:]
    segments = [segment.ljust(4, "_") for segment in path.split(".")] if path else []
    if len(segments) > 255 or any(len(segment) != 4 for segment in segments):
        raise ValueError(f"invalid name: {path!r}")
    body = "".join(segments).encode("ascii")
    if not segments:
        body = b"\x00"
    elif len(segments) == 2:
        body = b"\x2e" + body
    elif len(segments) > 2:
        body = b"\x2f" + bytes([len(segments)]) + body
    return prefix.encode("ascii") + body


@lru_cache(_TERMS)
def pkg_length(size: int) -> bytes:
    """Encode the PkgLength of a package with ``size`` bytes of content; it includes its own bytes."""
    if size + 1 < 0x40:
        return bytes([size + 1])
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML package of {size} bytes is too long")


def _package(opcode: bytes, content: bytes) -> bytes:
    return opcode + pkg_length(len(content)) + content


@lru_cache(_TERMS)
def integer(value: int) -> bytes:
    """Encode an unsigned integer of up to 64 bits, in the shortest form."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} needs more than 64 bits")


def string(text: str) -> bytes:
    """Encode a string (ASCII)."""
    return b"\x0d" + text.encode("ascii") + b"\x00"


def eisa_id(text: str) -> bytes:
    """Encode an EISA ID such as ``PNP0A08`` (ACPI 6.5, section 19.3.4)."""
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + packed.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    """``Buffer () {data}``."""
    return _package(b"\x11", integer(len(data)) + data)


def uuid_buffer(text: str) -> bytes:
    """``ToUUID (text)``: 16 bytes, the first three fields little-endian."""
    return buffer(uuid.UUID(text).bytes_le)


def package(*elements: bytes) -> bytes:
    """``Package () {elements}``, at most 255."""
    return _package(b"\x12", bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) {terms}``."""
    return _package(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) {terms}``."""
    return _package(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Define a method (``Method (path, arguments, serialized) {terms}``) of up to 7 arguments."""
    flags = arguments | (0x08 if serialized else 0)
    return _package(b"\x14", name_string(path) + bytes([flags]) + b"".join(terms))


def arg(number: int) -> bytes:
    """``ArgN``, from 0 to 6."""
    return bytes([0x68 + number])


def local(number: int) -> bytes:
    """``LocalN``, from 0 to 7."""
    return bytes([0x60 + number])


def store(value: bytes, target: bytes) -> bytes:
    """``Store (value, target)``."""
    return b"\x70" + value + target


def and_(left: bytes, right: bytes, target: bytes = ZERO) -> bytes:
    """``And (left, right, target)``; without a target the result only."""
    return b"\x7b" + left + right + target


def or_(left: bytes, right: bytes, target: bytes = ZERO) -> bytes:
    """``Or (left, right, target)``; without a target the result only."""
    return b"\x7d" + left + right + target


def equal(left: bytes, right: bytes) -> bytes:
    """``LEqual (left, right)``."""
    return b"\x93" + left + right


def not_equal(left: bytes, right: bytes) -> bytes:
    """``LNotEqual (left, right)``."""
    return b"\x92" + equal(left, right)


def if_(condition: bytes, *terms: bytes) -> bytes:
    """``If (condition) {terms}``."""
    return _package(b"\xa0", condition + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    """``Else {terms}``, after ``If``."""
    return _package(b"\xa1", b"".join(terms))


def return_(value: bytes) -> bytes:
    """``Return (value)``."""
    return b"\xa4" + value


def notify(path: str, value: int) -> bytes:
    """``Notify (path, value)``."""
    return b"\x86" + name_string(path) + integer(value)


def port_region(path: str, base: int, size: int) -> bytes:
    """``OperationRegion (path, SystemIO, base, size)``."""
    return b"\x5b\x80" + name_string(path) + b"\x01" + integer(base) + integer(size)


def dword_fields(region: str, *names: str) -> bytes:
    """``Field (region, DWordAcc, NoLock, WriteAsZeros)`` of adjacent 32-bit registers."""
    fields = b"".join(name_string(name) + b"\x20" for name in names)  # a PkgLength that counts 32 bits
    return _package(b"\x5b\x81", name_string(region) + b"\x43" + fields)


def dword_field(source: bytes, offset: int, path: str) -> bytes:
    """``CreateDWordField (source, offset, path)``; ``offset`` in bytes."""
    return b"\x8a" + source + integer(offset) + name_string(path)


# --- resource descriptors


def resources(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () {descriptors}``: a buffer that ends with an end tag without a checksum."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, size: int) -> bytes:
    """Return fixed I/O ports with 16-bit decoding (``IO``)."""
    return b"\x47\x01" + base.to_bytes(2, "little") * 2 + bytes([1, size])


def irq_edge(line: int) -> bytes:
    """Return an edge-triggered, active-high, exclusive IRQ below 16 (``IRQ``)."""
    return b"\x22" + (1 << line).to_bytes(2, "little")


def interrupt_level(gsi: int) -> bytes:
    """Return a level-triggered, active-high, exclusive GSI (``Interrupt``)."""
    return b"\x89\x06\x00\x01\x01" + gsi.to_bytes(4, "little")


def memory32_fixed(base: int, size: int) -> bytes:
    """Return a fixed range below 4 GiB (``Memory32Fixed``)."""
    return b"\x86\x09\x00\x01" + base.to_bytes(4, "little") + size.to_bytes(4, "little")


def _address_space(kind: int, specific: int, base: int, size: int, width: int) -> bytes:
    tag = {2: 0x88, 4: 0x87, 8: 0x8A}[width]
    # Producer, positive decoding, both ends fixed.
    body = bytes([kind, 0x0C, specific])
    for value in (0, base, base + size - 1, 0, size):
        body += value.to_bytes(width, "little")
    return bytes([tag]) + len(body).to_bytes(2, "little") + body


def bus_numbers(first: int, count: int) -> bytes:
    """Bus numbers that a host bridge decodes (``WordBusNumber``)."""
    return _address_space(2, 0, first, count, 2)


def io_window(base: int, size: int) -> bytes:
    """Return a window for I/O BARs (``WordIO``)."""
    return _address_space(1, 3, base, size, 2)


def memory_window(base: int, size: int) -> bytes:
    """Return a window for memory BARs: ``DWordMemory`` if it ends below 4 GiB, else ``QWordMemory``."""
    return _address_space(0, 1, base, size, 4 if base + size <= 1 << 32 else 8)
