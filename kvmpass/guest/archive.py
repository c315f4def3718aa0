"""Decode the archives that a guest sends: format "newc", one after the other.

The format is that of :mod:`kvmpass.initramfs.cpio` (Documentation/driver-api/early-userspace/buffer-format.rst). The
guest is not trusted: what is not of this form is an error, and at most a header and a name are kept.
"""

from __future__ import annotations

import os
from typing import Protocol

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import BadArchive

MAX_NAME = 4096  # bytes, with the zero byte at its end: PATH_MAX
MAX_ZEROS = 1 << 16
"""Bytes of zeros between two archives; cpio fills blocks of at most a few KiB."""
_HEADER = 110  # bytes
_FIELDS = lazy_pattern(rb"070701(?:[0-9A-Fa-f]{8}){13}")
_MODE, _LINKS, _SIZE, _NAME_SIZE = 1, 4, 6, 11  # positions of fields
_END = b"TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """The header of a file in an archive."""

    name: str
    """As it was sent."""
    mode: int
    """Type and mode, as in ``st_mode``; 32 bits."""
    size: int
    """Bytes of its content, below 4 GiB."""
    links: int
    """Number of its hard links."""


class ArchiveReceiver(Protocol):
    """What takes the content of archives."""

    def entry(self, entry: Entry) -> None:
        """Take the header of the next file. Its content follows."""

    def content(self, data: memoryview) -> None:
        """Take a part of the file's content."""

    def end_of_entry(self) -> None:
        """Take note that the content is complete."""

    def end_of_archive(self) -> None:
        """Take note that the archive is complete."""


class ArchiveReader:
    """Decode a stream of archives for ``receiver``. Zeros may lie between them.

    Synchronization: one thread at a time.
    """

    def __init__(self, receiver: ArchiveReceiver) -> None:
        self._receiver = receiver
        self._head = bytearray()  # of a header and its name, as far as they have come
        self._wanted = _HEADER
        self._entry: Entry | None = None  # whose content comes
        self._left = self._padding = self._zeros = 0
        self._between = True  # two archives

    @property
    def between(self) -> bool:
        """Whether all archives that have begun are complete."""
        return self._between and not self._head

    def feed(self, data: bytes) -> None:
        """Decode ``data``. Raises ``BadArchive``, and what the receiver raises."""
        view = memoryview(data)
        while view:
            if self._padding:
                taken = min(self._padding, len(view))
                self._padding -= taken
            elif self._entry:
                taken = min(self._left, len(view))
                self._left -= taken
                self._receiver.content(view[:taken])
                self._end_entry()
            elif self._between and not self._head and view[0] == 0:
                taken = len(view) - len(bytes(view).lstrip(b"\0"))
                self._zeros += taken
                if self._zeros > MAX_ZEROS:
                    raise BadArchive(f"the guest sent more than {MAX_ZEROS >> 10} KiB of zeros for an archive")
            else:
                taken = min(self._wanted - len(self._head), len(view))
                self._head += view[:taken]
                if len(self._head) == self._wanted:
                    self._on_head()
            view = view[taken:]

    def _on_head(self) -> None:
        """Look at a header, and again once its name has come."""
        if not _FIELDS.fullmatch(self._head[:_HEADER]):
            raise BadArchive("the guest sent no archive where one was expected")
        fields = [int(self._head[6 + 8 * field : 14 + 8 * field], 16) for field in range(13)]
        name_size = fields[_NAME_SIZE]
        if not 2 <= name_size <= MAX_NAME:
            raise BadArchive(f"the guest's archive has a name of {name_size} bytes")
        self._wanted = _HEADER + name_size
        if len(self._head) < self._wanted:
            return
        name = bytes(self._head[_HEADER:])
        if name.find(b"\0") != name_size - 1:
            raise BadArchive("the guest's archive has a name that does not end where it says")
        self._padding = -self._wanted % 4
        self._head.clear()
        self._wanted = _HEADER
        self._between = name[:-1] == _END
        self._zeros = 0
        if self._between:
            self._receiver.end_of_archive()
            return
        self._left = fields[_SIZE]
        self._entry = Entry(os.fsdecode(name[:-1]), fields[_MODE], self._left, fields[_LINKS])
        self._receiver.entry(self._entry)
        self._end_entry()

    def _end_entry(self) -> None:
        if self._entry and not self._left:
            self._padding += -self._entry.size % 4
            self._entry = None
            self._receiver.end_of_entry()
