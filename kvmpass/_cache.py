"""The user's cache: where it is, and files that a run leaves there for later ones.

Such a file is used only if it belongs to the effective user, and nobody else can write it or its directory. Whatever
is wrong with the cache, it is as if the file were missing, but for its checksum, which is known at its end only: who
has used the pieces before gets an error instead of the last one.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvmpass._log import Log
from kvmpass._teardown import undo_on_error

if TYPE_CHECKING:
    from queue import SimpleQueue
    from threading import Thread

log = Log("kvmpass.cache")

PATIENCE = 10.0
"""Seconds without a MiB of progress after which a file system stalls (a CPU that is shared by many takes 1)."""

_PIECE = 1 << 20
_MAGIC = b"kvmpass kept 1\n\0"
_HEADER = struct.Struct("<16sQII32x")  # magic, bytes of content, their CRC-32, zero; a cache line each
_DRAFT = "."  # what names of unfinished files begin with
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_resolved: dict[str, Path] = {}  # directories by what names them: a guest's process changes its working directory


def cache_root() -> Path:
    """Return the cache's directory, which may not exist. Raises ``RuntimeError`` for a user without a home.

    A relative ``KVMPASS_CACHE`` keeps the meaning that it has in the first call; a relative ``XDG_CACHE_HOME`` is
    invalid, and ignored (XDG Base Directory Specification).
    """
    if named := os.environ.get("KVMPASS_CACHE"):
        return _resolved.get(named) or _resolved.setdefault(named, Path(named).absolute())
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home().absolute() / ".cache") / "kvmpass"


class KeptFiles(NamedTuple):
    """Files in a directory of the cache, of which the least recently used are removed.

    Synchronization: from any thread and process. A file is replaced or removed, but never changed.
    """

    folder: str
    """The directory, below ``cache_root()``."""
    most_files: int
    """How many may stay."""
    most_bytes: int
    """Their bytes together."""

    def open(self, name: str) -> KeptFile | None:
        """Open a file; None if there is none that can be trusted. The reader finds out about its checksum."""
        try:
            with _directory(self.folder) as directory:
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO has no writer
                file = FileIO(name, opener=lambda path, _: os.open(path, flags, dir_fd=directory))
                with undo_on_error(file.close):
                    return KeptFile(file, *_checked(file.fileno(), self.most_bytes))
        except FileNotFoundError:
            pass
        except (OSError, RuntimeError, ValueError) as error:
            log.debug("%s/%s in the cache is not used: %s", self.folder, name, error)
        return None

    def keep(self, name: str, content: memoryview) -> None:
        """Write a file, and remove what is too much. It fails silently, and leaves nothing incomplete.

        Nothing is kept while another process writes one.
        """
        try:
            if len(content) > self.most_bytes:
                raise ValueError(f"{len(content)} bytes, of at most {self.most_bytes}")
            with _directory(self.folder, make=True) as directory, _only_writer(directory):
                _remove_drafts(directory)
                _write(directory, name, content)
                self._prune(directory)
        except (OSError, RuntimeError, ValueError) as error:
            log.debug("%s/%s is not kept in the cache: %s", self.folder, name, error)

    def remove(self, name: str) -> None:
        """Remove a file whose content turned out to be wrong. It fails silently."""
        with suppress(OSError, RuntimeError), _directory(self.folder) as directory:
            os.unlink(name, dir_fd=directory)

    def obstacle(self) -> str:
        """Return why nothing can be kept in the directory, which is made if it is missing; empty: nothing known."""
        try:
            with _directory(self.folder, make=True):
                return ""
        except (OSError, RuntimeError, ValueError) as error:
            return str(error)

    def _prune(self, directory: int) -> None:
        found: list[tuple[int, int, str]] = []
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                at = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if stat.S_ISREG(at.st_mode) and not name.startswith(_DRAFT):
                    found.append((at.st_mtime_ns, at.st_size, name))
        total = 0
        for number, (_, size, name) in enumerate(sorted(found, reverse=True)):
            total += size
            if number >= self.most_files or total > self.most_bytes:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)


class KeptFile:
    """An open file of the cache.

    Synchronization: from one thread.
    """

    def __init__(self, file: FileIO, size: int, checksum: int) -> None:
        self.size = size
        """Bytes of its content."""
        self._file, self._checksum = file, checksum
        self._reader: Thread | None = None

    def pieces(self) -> Generator[memoryview]:
        """Yield its content, once, in pieces of at most a MiB. Each is valid until the next one is asked for.

        A thread reads ahead. Raises ``TimeoutError`` once it has read nothing for ``PATIENCE`` seconds, and other
        ``OSError``: ``EBADMSG`` instead of the last piece if the content is not what was written.
        """
        from queue import Empty, SimpleQueue
        from threading import Thread

        free, full = SimpleQueue[memoryview | None](), SimpleQueue[tuple[memoryview, int] | OSError]()
        for _ in range(2):
            free.put(private_memory(_PIECE))
        self._reader = Thread(target=self._read_ahead, args=(free, full), name="read", daemon=True)
        left = self.size
        try:
            try:
                self._reader.start()
            except RuntimeError as error:  # a limit of threads
                self._reader = None
                raise OSError(errno.EAGAIN, str(error)) from None
            while left:
                got = full.get(timeout=PATIENCE)
                if isinstance(got, OSError):
                    raise got
                buffer, length = got
                yield buffer[:length]
                left -= length
                free.put(buffer)
        except Empty:
            raise TimeoutError(errno.ETIMEDOUT, f"no progress in {PATIENCE:g} seconds") from None
        finally:
            free.put(None)

    def _read_ahead(
        self, free: SimpleQueue[memoryview | None], full: SimpleQueue[tuple[memoryview, int] | OSError]
    ) -> None:
        """Read until the end, or until nobody wants more, and close the file."""
        import zlib

        found, left = 0, self.size
        try:
            with self._file as file:
                file.seek(_HEADER.size)
                while left and (buffer := free.get()) is not None:
                    # Not a mapping of the file: one that becomes shorter, or cannot be read, would be a SIGBUS.
                    length = file.readinto(buffer[:left])
                    found = zlib.crc32(buffer[:length], found)
                    left -= length
                    if not length or (not left and found != self._checksum):
                        raise OSError(errno.EBADMSG, "what is in the cache is not what was written")
                    if not left:
                        with suppress(OSError):  # the cache may be read-only
                            os.utime(file.fileno())
                    full.put((buffer, length))
        except OSError as error:
            full.put(error)

    def close(self) -> None:
        """Close it, unless its reader does. Idempotent."""
        if self._reader is None:
            self._file.close()


def private_memory(size: int) -> memoryview:
    """Return so many bytes, which leave the process once they are not used: memory of malloc may stay."""
    import mmap

    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@contextmanager
def _directory(folder: str, *, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of a directory of the cache that only this user can change. Raises ``OSError``."""
    path = cache_root() / folder
    if make and not path.is_dir():
        _check_above(next(parent for parent in path.parents if parent.is_dir()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _check_owner(os.fstat(directory), str(path))
        yield directory
    finally:
        os.close(directory)


def _check_above(path: Path) -> None:
    """Check a directory that the cache is to be made in: this user's, or one of root where nobody replaces it.

    With another user's HOME (sudo -E) they would own a cache that they cannot write.
    """
    at = path.stat()
    replaceable = at.st_mode & _OTHERS_WRITE and not at.st_mode & stat.S_ISVTX
    if at.st_uid != os.geteuid() and (at.st_uid != 0 or replaceable):
        raise PermissionError(f"{path} is another user's, or all can replace what is in it")


@contextmanager
def _only_writer(directory: int) -> Iterator[None]:
    """Lock the directory against other writers. Raises ``OSError`` at once if there is one."""
    import fcntl

    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)  # a child may have inherited the descriptor


def _remove_drafts(directory: int) -> None:
    """Remove files of writers that were killed: this is the only one."""
    for name in os.listdir(directory):
        if name.startswith(_DRAFT):
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)


def _check_owner(at: os.stat_result, name: str) -> None:
    if at.st_uid != os.geteuid() or at.st_mode & _OTHERS_WRITE:
        raise PermissionError(f"another user can write {name}")


def _checked(fd: int, most: int) -> tuple[int, int]:
    """Return size and checksum of a file of ours. Raises ``OSError``, and ``ValueError`` for one that is torn."""
    at = os.fstat(fd)
    _check_owner(at, "it")
    if not stat.S_ISREG(at.st_mode) or at.st_size <= _HEADER.size:
        raise ValueError("no file of kvmpass")
    magic, size, checksum, _ = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    if magic != _MAGIC or _HEADER.size + size != at.st_size or size > most:
        raise ValueError("not complete")
    return size, checksum


def _write(directory: int, name: str, content: memoryview) -> None:
    """Write a file so that it is never seen incomplete (rename(2)). Raises ``OSError``."""
    import zlib

    draft = f"{_DRAFT}{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(draft, flags, 0o600, dir_fd=directory), "wb") as file:
        try:
            file.write(_HEADER.pack(_MAGIC, len(content), zlib.crc32(content), 0))
            file.write(content)
            file.flush()
            os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft, dir_fd=directory)
            raise
