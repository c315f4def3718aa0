"""The user's cache: where it is, and files that a run leaves there for later ones.

Such a file is used only if it belongs to the effective user, nobody else can write it or its directory, and its
checksum is right. Whatever is wrong with the cache, it is as if the file were missing.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kvmpass._log import Log

log = Log("kvmpass.cache")

PIECE = 1 << 20
"""Bytes after which to call ``drop_pages``."""

_MAGIC = b"kvmpass kept 1\n\0"
_HEADER = struct.Struct("<16sQII32x")  # magic, bytes of content, their CRC-32, zero; a cache line each
_DRAFT = "."  # what names of unfinished files begin with
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """Return the cache's directory, which may not exist. Raises ``RuntimeError`` for a user without a home."""
    named = os.environ.get("KVMPASS_CACHE")
    if named:
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "kvmpass"


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

    def read(self, name: str) -> memoryview | None:
        """Return the content of a file, mapped for reading; None if there is none that can be trusted.

        ``drop_pages`` keeps it from counting as this process's memory.
        """
        try:
            with _directory(self.folder) as directory:
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO has no writer
                fd = os.open(name, flags, dir_fd=directory)
                try:
                    return _checked(fd)
                finally:
                    os.close(fd)
        except FileNotFoundError:
            pass
        except (OSError, RuntimeError, ValueError) as error:
            log.debug("%s/%s in the cache is not used: %s", self.folder, name, error)
        return None

    def keep(self, name: str, content: memoryview) -> None:
        """Write a file, and remove what is too much. It fails silently, and leaves nothing incomplete."""
        try:
            if len(content) <= self.most_bytes:
                with _directory(self.folder, make=True) as directory:
                    self._remove_drafts(directory)
                    _write(directory, name, content)
                    self._prune(directory)
        except (OSError, RuntimeError, ValueError) as error:
            log.debug("%s/%s is not kept in the cache: %s", self.folder, name, error)

    def _remove_drafts(self, directory: int) -> None:
        """Remove files of writers that have been killed: those that are written are locked."""
        import fcntl

        for name in os.listdir(directory):
            if name.startswith(_DRAFT):
                with suppress(OSError):
                    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(name, dir_fd=directory)
                    finally:
                        os.close(fd)

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


def drop_pages(content: memoryview) -> None:
    """Unmap the pages of what ``KeptFiles.read`` returned: the next access maps them again. Others are left alone."""
    import mmap

    if content.readonly and isinstance(content.obj, mmap.mmap):
        content.obj.madvise(mmap.MADV_DONTNEED)


@contextmanager
def _directory(folder: str, *, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of a directory of the cache that only this user can change. Raises ``OSError``."""
    path = cache_root() / folder
    if make and not path.is_dir():
        # With another user's HOME (sudo -E) they would own a cache that they cannot write.
        above = next(parent for parent in path.parents if parent.is_dir())
        if above.stat().st_uid != os.geteuid():
            raise PermissionError(f"{above} is another user's")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        _check_owner(os.fstat(directory))
        yield directory
    finally:
        os.close(directory)


def _check_owner(at: os.stat_result) -> None:
    if at.st_uid != os.geteuid() or at.st_mode & _OTHERS_WRITE:
        raise PermissionError("another user can write it")


def _checked(fd: int) -> memoryview:
    """Return the content of a file of ours. Raises ``OSError``, and ``ValueError`` for one that is torn."""
    import mmap
    import zlib

    at = os.fstat(fd)
    _check_owner(at)
    if not stat.S_ISREG(at.st_mode) or at.st_size <= _HEADER.size:
        raise ValueError("no file of kvmpass")
    magic, size, checksum, _ = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    if magic != _MAGIC or _HEADER.size + size != at.st_size:
        raise ValueError("not complete")
    content = memoryview(mmap.mmap(fd, at.st_size, mmap.MAP_PRIVATE, mmap.PROT_READ))[_HEADER.size :]
    found = 0
    for start in range(0, size, PIECE):
        found = zlib.crc32(content[start : start + PIECE], found)
        drop_pages(content)
    if found != checksum:
        raise ValueError("its checksum is wrong")
    with suppress(OSError):  # the cache may be read-only
        os.utime(fd)
    return content


def _write(directory: int, name: str, content: memoryview) -> None:
    """Write a file so that it is never seen incomplete (rename(2)). Raises ``OSError``."""
    import fcntl
    import zlib

    draft = f"{_DRAFT}{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(draft, flags, 0o600, dir_fd=directory), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(_HEADER.pack(_MAGIC, len(content), zlib.crc32(content), 0))
            file.write(content)
            file.flush()
            os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft, dir_fd=directory)
            raise
