"""Decompress the kernel in a bzImage on this host, once: the result is kept in the user's cache.

The payload is the vmlinux without symbols, and relocations after it that only a kernel at another address needs
(arch/x86/boot/compressed/Makefile). Its last four bytes are the size of both, decompressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread
from typing import Any, Protocol

from kvmpass._cache import KeptFiles
from kvmpass._log import Log
from kvmpass.layout import MIB

log = Log("kvmpass.boot")

_KEPT = KeptFiles("vmlinux", most_files=4, most_bytes=256 * MIB)
_PIECE = MIB
_MOST_WINDOW = 256 * MIB  # of a decompressor: zstd --ultra -22 (scripts/Makefile.lib) has 128 MiB


class Compressed(Protocol):
    """A kernel whose payload can be decompressed (``KernelImage``)."""

    @property
    def path(self) -> str:
        """Its path, for messages."""

    @property
    def init_size(self) -> int:
        """Bytes of memory that the kernel needs, which is more than those of its decompressed payload."""

    def compressed(self) -> memoryview:
        """Return the payload. Raises ``ValueError``."""


class Unpacking:
    """Decompression of a kernel's payload, or of what a run before has left in the cache.

    Synchronization: from any thread, one at a time. Its own thread ends by itself.
    """

    def __init__(self, kernel: Compressed) -> None:
        self._kernel = kernel
        self._ready: Event | None = None
        self._content: memoryview | None = None

    def begin(self) -> None:
        """Start a thread that prepares what the next ``take`` returns. Idempotent."""
        if self._ready is None:
            self._ready = ready = Event()
            try:
                Thread(target=self._prepare, args=(ready,), name="unpack", daemon=True).start()
            except RuntimeError:  # a limit of threads: ``take`` does it
                self._ready = None

    def take(self) -> memoryview | None:
        """Return the decompressed payload; None if it cannot be decompressed here. It is not kept in this object."""
        if self._ready is None:
            self._prepare(Event())
        else:
            self._ready.wait()
        content, self._content, self._ready = self._content, None, None
        return content

    def _prepare(self, ready: Event) -> None:
        """Prepare the payload, and set ``ready`` before it is written to the cache."""
        new: memoryview | None = None
        name = ""
        try:
            data = self._kernel.compressed()
            name = _name(data)
            self._content = _KEPT.read(name)
            if self._content is None:
                self._content = new = decompress(data, self._kernel.init_size)
        except Exception as error:  # of any of the decompressors: the kernel decompresses itself then
            log.debug("%s is not decompressed: %s", self._kernel.path, error or type(error).__name__)
        finally:
            ready.set()
        if new is not None:
            _KEPT.keep(name, new)


def _name(data: memoryview) -> str:
    """Return a name for the payload: two checksums of all of it, and its size."""
    import zlib

    return f"{zlib.crc32(data):08x}{zlib.adler32(data):08x}-{len(data):x}"


def decompress(data: memoryview, most: int) -> memoryview:
    """Decompress a payload (gzip, bzip2, LZMA, XZ, Zstandard) to at most ``most`` bytes.

    Raises ``ValueError``, and what its decompressor raises for a broken one.
    """
    import mmap

    size = int.from_bytes(data[-4:], "little")
    if not 0 < size <= most:
        raise ValueError(f"{size} bytes when decompressed, of at most {most}")
    # Not a bytearray: memory of malloc may stay with the process.
    content = memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    at = 0
    for piece in _pieces(data):
        if at + len(piece) > size:
            raise ValueError("more bytes than it says")
        content[at : at + len(piece)] = piece
        at += len(piece)
    if at != size:
        raise ValueError(f"{at} of {size} bytes")
    return content


def _pieces(data: memoryview) -> Iterator[bytes]:
    """Yield decompressed pieces of at most a MiB: between them a signal is handled."""
    magic = bytes(data[:6])
    if magic.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        import lzma

        kind = lzma.FORMAT_XZ if magic.startswith(b"\xfd") else lzma.FORMAT_ALONE
        yield from _from(lzma.LZMADecompressor(kind, memlimit=_MOST_WINDOW), data)
    elif magic.startswith(b"BZh"):
        import bz2

        yield from _from(bz2.BZ2Decompressor(), data)
    elif magic.startswith(b"\x1f\x8b"):
        import zlib

        stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        for start in range(0, len(data), _PIECE):
            rest: bytes | memoryview = data[start : start + _PIECE]
            while rest and not stream.eof:
                yield stream.decompress(rest, _PIECE)
                rest = stream.unconsumed_tail
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        with zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW).stream_reader(data[:-4]) as reader:
            while piece := reader.read(_PIECE):
                yield piece
    else:
        raise ValueError(f"compressed in a way that begins with {magic.hex()}")


def _from(stream: Any, data: memoryview) -> Iterator[bytes]:
    """Yield the pieces of a decompressor of the standard library that keeps its input."""
    for start in range(0, len(data), _PIECE):
        rest: bytes | memoryview = data[start : start + _PIECE]
        while not stream.eof and (rest or not stream.needs_input):
            yield stream.decompress(rest, _PIECE)
            rest = b""
