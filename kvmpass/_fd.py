"""File descriptors with one owner, and exceptions for failed system calls."""

from __future__ import annotations

import errno
import os
import resource
import warnings
from typing import Self

from kvmpass.errors import Closed


def check(result: int, ioctl: str, detail: str = "", remedy: str | None = None) -> int:
    """Return ``result``, or raise ``OSError`` if it is a negated errno.

    Python chooses the subclass (``PermissionError``, ``FileExistsError`` …). The exception has ``.ioctl`` (the
    call's name), its message starts with that name, and ``remedy`` is a note.
    """
    if result >= 0:
        return result
    raise failure(-result, ioctl, detail, remedy)


def failure(code: int, call: str, detail: str = "", remedy: str | None = None) -> OSError:
    """Return the exception that ``check`` raises, for the errno ``code``."""
    message = f"{call}: {os.strerror(code)}"
    if detail:
        message += f" ({detail})"
    error = OSError(code, message)
    error.ioctl = call  # type: ignore[attr-defined]
    if remedy:
        error.add_note(remedy)
    return error


def open_node(path: str, flags: int = os.O_RDWR) -> int:
    """Open a device node close-on-exec. Raises ``OSError`` with the path."""
    return os.open(path, flags | os.O_CLOEXEC)


def raise_nofile_limit() -> None:
    """Raise the soft ``RLIMIT_NOFILE`` to the hard one: each MSI-X vector, up to 2048, uses a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class OwnedFd:
    """A descriptor that belongs to one object, which closes it. Subclasses stand for one kernel object each.

    An object that is not closed warns (``ResourceWarning``).

    Synchronization: ``close`` while no other thread uses the object.
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
        """Return ``fd``, for ``select`` and the like."""
        return self.fd

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Only a warning: closing in a finalizer would hide the order that teardown needs.
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {type(self).__name__} (fd {self._fd})", ResourceWarning, stacklevel=2)
