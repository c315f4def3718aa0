"""Create what a guest's archive has beneath a directory of the host.

The guest is not trusted: only regular files and directories are created, only beneath the directory, and within
limits.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from kvmpass._beneath import open_beneath
from kvmpass._dataclass import dataclass
from kvmpass.errors import BadArchive
from kvmpass.files.user import sudo_caller
from kvmpass.guest.archive import Entry
from kvmpass.guest.destination import Destination

MAX_BYTES = 4 << 30
"""Of all files of one archive together."""
MAX_FILES = 100_000
"""Files and directories of one archive."""
MAX_DEPTH = 64
"""Directories above a file."""
_REPORTED = 16  # names that are reported; the others are counted
_SHOWN = 200  # characters of a name
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOSYS)  # the next file would fail as well
_KINDS = {
    stat.S_IFLNK: "a symlink",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class CopiedOut:
    """What was brought out of a guest."""

    source: str
    """Its path in the guest."""
    target: str
    """Its path on the host."""
    files: int
    """Number of files and directories, complete ones."""
    bytes: int
    """Bytes of content written, those of incomplete files included."""
    left_out: tuple[str, ...]
    """What was left out, and why: at most 17 lines."""
    error: str | None
    """Why it is incomplete; None: all regular files and directories are there."""


class Extraction:
    """An ``ArchiveReceiver`` that creates what one archive has. The archive's first file is the destination itself.

    Existing files are replaced, and what is in existing directories stays. Modes are those of the guest, less what
    the umask and ``_mode`` deny. Under sudo the owner is the user who called it. ``close`` it.

    Synchronization: one thread at a time.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._owner = sudo_caller()
        self._base = -1  # until there is something to create
        self._parent: tuple[str, int] | None = None  # the latest one, open
        self._fd: int | None = None  # of the file whose content comes
        self._path = ""
        self._begun = self._done = self._failed = False
        self._files = self._bytes = self._announced = self._seen = self._not_reported = 0
        self._left_out: list[str] = []
        self.error: str | None = None
        """Why nothing more of the archive is created."""

    # --- as an ArchiveReceiver

    def entry(self, entry: Entry) -> None:
        """See ``ArchiveReceiver``. Raises ``BadArchive`` for a name that is not of a file beneath it."""
        self._check_more()
        parts = self._parts(entry)
        self._begun = True
        self._path = "/".join(parts)
        self._seen += 1
        self._announced += entry.size  # also of what is left out: the guest must not send for ever
        if self.error is not None:
            return
        if self._seen > MAX_FILES:
            self.error = f"more than {MAX_FILES} files"
        elif len(parts) > MAX_DEPTH:
            self._leave_out(f"more than {MAX_DEPTH} directories deep", failed=True)
        elif self._announced > MAX_BYTES:
            self.error = f"more than {MAX_BYTES >> 30} GiB"
        elif stat.S_ISREG(entry.mode) and entry.links > 1 and entry.size == 0:
            self._leave_out("a hard link, whose content is elsewhere in the archive")
        elif stat.S_ISREG(entry.mode) or stat.S_ISDIR(entry.mode):
            self._attempt(entry)
        else:
            self._leave_out(_KINDS.get(stat.S_IFMT(entry.mode), "of an unknown type"), failed=self._seen == 1)

    def content(self, data: memoryview) -> None:
        """See ``ArchiveReceiver``."""
        if self._fd is None:
            return
        try:
            while data:
                written = os.write(self._fd, data)
                self._bytes += written
                data = data[written:]
        except OSError as error:
            self._refuse(error)

    def end_of_entry(self) -> None:
        """See ``ArchiveReceiver``."""
        if self._fd is not None:
            self._files += 1
            self._close_file()

    def end_of_archive(self) -> None:
        """See ``ArchiveReceiver``. Raises ``BadArchive`` for a second archive."""
        self._check_more()
        self._done = True

    def _check_more(self) -> None:
        if self._done:
            raise BadArchive("the guest has sent more archives than it was asked for")

    # --- its end

    def result(self, cause: str | None = None) -> CopiedOut:
        """Return what was done. ``cause``: why the archive is not complete, if it is not."""
        error = self.error or (None if self._done else cause or "the guest has not sent all of it")
        if error is None and not self._begun:
            error = "no such file or directory in the guest"
        if error is None and self._failed:
            error = "some of it was left out"
        more = (f"and {self._not_reported} more",) if self._not_reported else ()
        destination = self._destination
        return CopiedOut(
            destination.source, str(destination.path), self._files, self._bytes, (*self._left_out, *more), error
        )

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        self._close_file()
        self._close_parent()
        base, self._base = self._base, -1
        if base >= 0:
            os.close(base)

    # --- paths

    def _parts(self, entry: Entry) -> list[str]:
        """Return the parts of an entry's path beneath the base directory."""
        own = [self._destination.name] if self._destination.name else []
        if not self._begun and not stat.S_ISDIR(entry.mode):
            return own  # a file, whatever its name
        parts = [part for part in entry.name.split("/") if part != "."]
        if "" in parts or ".." in parts:
            raise BadArchive(f"the guest's archive has the name {_shortened(entry.name)!r}")
        return own + parts

    def _directory_of(self, path: str) -> int:
        """Return a descriptor of the directory in which ``path`` is. It belongs to this object."""
        parent = path.rpartition("/")[0]
        if not parent:
            return self._base
        if self._parent is None or self._parent[0] != parent:
            self._close_parent()
            self._parent = parent, open_beneath(self._base, parent, os.O_PATH | os.O_DIRECTORY)
        return self._parent[1]

    def _close_parent(self) -> None:
        parent, self._parent = self._parent, None
        if parent is not None:
            os.close(parent[1])

    # --- files

    def _attempt(self, entry: Entry) -> None:
        try:
            if self._base < 0:
                self._base = self._destination.open()
            if stat.S_ISDIR(entry.mode):
                self._make_directory(entry.mode)
            else:
                self._make_file(entry.mode)
        except OSError as error:
            self._refuse(error)

    def _make_directory(self, mode: int) -> None:
        if not self._path:
            self._files += 1  # the base directory itself
            return
        directory, name = self._directory_of(self._path), self._path.rpartition("/")[2]
        try:
            os.mkdir(name, mode & 0o775 | 0o700, dir_fd=directory)
        except FileExistsError:
            # Refuses what is not a directory.
            os.close(open_beneath(directory, name, os.O_PATH | os.O_DIRECTORY))
        else:
            if self._owner:
                os.chown(name, self._owner.uid, self._owner.gid, dir_fd=directory, follow_symlinks=False)
        self._files += 1

    def _make_file(self, mode: int) -> None:
        if not self._path:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        directory, name = self._directory_of(self._path), self._path.rpartition("/")[2]
        # A new file in place of the old one, which may have other links, or be a symlink.
        with suppress(FileNotFoundError):
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) and not stat.S_ISLNK(found.st_mode):
                raise FileExistsError(errno.EEXIST, "something that is not a file is there")
            os.unlink(name, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(name, flags, mode & 0o775 | 0o600, dir_fd=directory)
        if self._owner:
            os.fchown(self._fd, self._owner.uid, self._owner.gid)

    def _close_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _refuse(self, error: OSError) -> None:
        """Leave the file out, or everything from here on: ``error`` was raised for it."""
        self._close_file()
        if error.errno in _FULL:
            self.error = f"{self._shown}: {error.strerror}"
        else:
            self._leave_out(error.strerror or str(error), failed=True)

    @property
    def _shown(self) -> str:
        """The path of the latest file, for a message."""
        return _shortened(self._path or str(self._destination.path))

    def _leave_out(self, why: str, *, failed: bool = False) -> None:
        self._failed = self._failed or failed
        if len(self._left_out) < _REPORTED:
            self._left_out.append(f"{self._shown}: {why}")
        else:
            self._not_reported += 1


def _shortened(path: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in path[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
