"""File descriptors with one owner, and system call results that become exceptions."""

from __future__ import annotations

import errno
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from kvmpass.errors import Closed


def check(result: int, ioctl: str, detail: str = "", remedy: str | None = None) -> int:
    """Return ``result``, or raise the ``OSError`` for it if it is a negated errno.

    Python picks the subclass (``PermissionError``, ``FileExistsError`` …). The exception has ``.ioctl`` (the
    call's name), its message starts with that name, and ``remedy`` is a note.
    """
    if result >= 0:
        return result
    raise failure(-result, ioctl, detail, remedy)


def failure(code: int, call: str, detail: str = "", remedy: str | None = None) -> OSError:
    """What ``check`` raises, for the errno ``code``."""
    message = f"{call}: {os.strerror(code)}"
    if detail:
        message += f" ({detail})"
    error = OSError(code, message)
    error.ioctl = call  # type: ignore[attr-defined]
    if remedy:
        error.add_note(remedy)
    return error


def open_node(path: str, flags: int = os.O_RDWR) -> int:
    """Open a device node close-on-exec; errors are plain ``OSError`` with the path."""
    return os.open(path, flags | os.O_CLOEXEC)


def allow_descriptors() -> None:
    """Raise this process's soft limit of descriptors to its hard one: each MSI-X vector takes one, up to 2048."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class OwnedFd:
    """A descriptor that belongs to one object: closed once, twice is harmless, forgotten warns.

    Subclasses stand for one kernel object each. Not thread-safe: close an object when no other thread uses it.
    """

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor. Raises ``Closed`` after ``close()``."""
        if self._fd < 0:
            raise Closed(f"{type(self).__name__} is closed")
        return self._fd

    def fileno(self) -> int:
        return self.fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Only a warning: releasing in a finalizer would hide the order in which things must go.
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {type(self).__name__} (fd {self._fd})", ResourceWarning, stacklevel=2)


@contextmanager
def closing_on_error(owner: OwnedFd) -> Iterator[None]:
    """For the rest of a constructor: an exception closes what was opened already."""
    try:
        yield
    except BaseException:
        owner.close()
        raise
