"""Decompress the kernel in a bzImage on this host, once: the result is kept in the user's cache.

The payload is the vmlinux without symbols, and relocations after it that only a kernel at another address needs
(arch/x86/boot/compressed/Makefile). Its last four bytes are the size of both, decompressed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from threading import Event, Lock, Thread
from typing import Any, Protocol

from kvmpass import _cache
from kvmpass._cache import KeptFiles, private_memory
from kvmpass._log import Log
from kvmpass._teardown import undo_on_error
from kvmpass.boot import vmlinux
from kvmpass.layout import MIB, Range

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

    Only the first ``load`` decompresses, and keeps the result. Later ones, on guest reboot, read the cache: they are
    made while a machine is locked.

    Synchronization: from any thread. Its own threads, at most three, end by themselves.
    """

    def __init__(self, kernel: Compressed) -> None:
        self.kernel = kernel
        """The kernel."""
        self.note = ""
        """Why the last ``load`` loaded nothing, or why the result cannot be kept; empty: neither."""
        self._lock = Lock()
        self._attempt: _Attempt | None = None  # that the next ``take`` gets
        self._latest: _Attempt | None = None
        self._stalled = False

    def begin(self) -> None:
        """Start a thread that prepares what the next ``load`` loads. Idempotent."""
        with self._lock:
            if self._attempt is None and not self._stalled:
                attempt = _Attempt(self.kernel, self._latest)
                try:
                    attempt.thread.start()
                except RuntimeError as error:  # a limit of threads: nothing is taken
                    self._refuse(str(error))
                else:
                    self._attempt = self._latest = attempt

    def load(self, code: Range, memory: vmlinux.Writes) -> int | None:
        """Load the decompressed kernel, which was linked to the start of ``code``, and return its entry point.

        None if that cannot be done here: ``code`` may have been written to, and the kernel decompresses itself. None
        as well once nothing has come from the cache or the decompressor for ten seconds: of a file system that stalls
        nothing is wanted after that.
        """
        content = self.take()
        if content is None:
            return None
        try:
            with closing(content):
                return vmlinux.load(content, code, memory)
        except ValueError as error:
            self._refuse(str(error))
        except OSError as error:
            self._refuse(error.strerror or str(error))
            if isinstance(error, TimeoutError):
                self._stalled = True
            elif error.errno in (errno.EBADMSG, errno.EIO):
                _KEPT.remove(_name(self.kernel.compressed()))
        return None

    def leave(self, reason: str) -> None:
        """Let the kernel decompress itself: nothing will be loaded."""
        self.cancel()
        self._refuse(reason)

    def cancel(self) -> None:
        """Release what was prepared, or will be. A later ``load`` begins again."""
        with self._lock:
            attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abandon()

    def take(self) -> vmlinux.Content | None:
        """Return what ``load`` loads, which the caller closes; None as ``load``. It is not kept in this object."""
        self.begin()
        with self._lock:
            attempt, self._attempt = self._attempt, None
        if attempt is None:
            return None
        with undo_on_error(attempt.abandon):
            content = attempt.wait()
        with self._lock:
            self._stalled |= attempt.stalled
        self.note = attempt.note
        return content

    def _refuse(self, reason: str) -> None:
        self.note = f"not decompressed on this host: {reason}"
        log.debug("%s is %s", self.kernel.path, self.note)


class _Decompressed:
    """A payload in memory."""

    def __init__(self, content: memoryview) -> None:
        self.size = len(content)
        self._content = content

    def pieces(self) -> Generator[memoryview]:
        yield self._content

    def close(self) -> None:
        self._content = memoryview(b"")


class _Attempt:
    """One preparation, in a thread of its own.

    Synchronization: ``wait`` and ``abandon`` from one thread.
    """

    def __init__(self, kernel: Compressed, before: _Attempt | None) -> None:
        self._kernel = kernel
        self._first = before is None
        self._before: Thread | None = before.thread if before is not None else None
        self._ready = Event()
        self._steps = 0
        self._content: vmlinux.Content | None = None
        self._abandoned = False
        self.stalled = False
        self.note = ""
        self.thread: Thread = Thread(target=self._prepare, name="unpack", daemon=True)

    def wait(self) -> vmlinux.Content | None:
        """Return what was prepared; None as well if it makes no progress, and then nothing of it stays."""
        steps = self._steps
        while not self._ready.wait(_cache.PATIENCE):
            if steps == self._steps:
                self.stalled = True
                self.note = f"not decompressed on this host: no progress in {_cache.PATIENCE:g} seconds"
                self.abandon()
                return None
            steps = self._steps
        content, self._content = self._content, None
        return content

    def abandon(self) -> None:
        """Release what was prepared, or will be."""
        self._abandoned = True
        self._release()

    def _release(self) -> None:
        content, self._content = self._content, None
        if content is not None:
            content.close()

    def _step(self) -> None:
        self._steps += 1

    def _prepare(self) -> None:
        """Prepare the payload, and say so before it is written to the cache."""
        new: memoryview | None = None
        name = ""
        try:
            if self._before is not None:
                self._before.join()  # it may be writing what is to be read
                self._before = None
            data = self._kernel.compressed()
            name = _name(data)
            self._content = _KEPT.open(name)
            if self._content is None and self._first:
                new = decompress(data, min(self._kernel.init_size, _KEPT.most_bytes), self._step)
                self._content = _Decompressed(new)
                if obstacle := _KEPT.obstacle():
                    self.note = f"not kept in the cache: {obstacle}"
            elif self._content is None:
                self.note = "not in the cache"
        except Exception as error:  # of any of the decompressors: the kernel decompresses itself then
            self.note = f"not decompressed on this host: {error or type(error).__name__}"
            log.debug("%s is %s", self._kernel.path, self.note)
        finally:
            self._ready.set()
        if self._abandoned:
            self._release()
        if new is not None:
            _KEPT.keep(name, new)


def _name(data: memoryview) -> str:
    """Return a name for the payload: nobody can make another one of the same name."""
    try:
        from _blake2 import blake2b  # ``hashlib`` loads OpenSSL, which takes ten times as long as hashing 5 MB
    except ImportError:  # CPython may be built without its own
        from hashlib import blake2b

    return blake2b(data, digest_size=32).hexdigest()


def decompress(data: memoryview, most: int, step: Callable[[], None] = lambda: None) -> memoryview:
    """Decompress a payload (gzip, bzip2, LZMA, XZ, Zstandard) to at most ``most`` bytes.

    ``step`` is called after each MiB, or less.
    Raises ``ValueError``, and what its decompressor raises for a broken one.
    """
    size = int.from_bytes(data[-4:], "little")
    if not 0 < size <= most:
        raise ValueError(f"{size} bytes when decompressed, of at most {most}")
    content = private_memory(size)
    at = 0
    for piece in _pieces(data):
        if at + len(piece) > size:
            raise ValueError("more bytes than it says")
        content[at : at + len(piece)] = piece
        at += len(piece)
        step()
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
