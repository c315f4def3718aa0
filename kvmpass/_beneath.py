"""Opening what is beneath a directory, and nothing else."""

from __future__ import annotations

import os

from kvmpass._fd import check
from kvmpass._native import lib

_RESOLVE = lib.RESOLVE_BENEATH | lib.RESOLVE_NO_SYMLINKS | lib.RESOLVE_NO_MAGICLINKS


def open_beneath(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """Open ``path``, relative to the descriptor ``directory``, close-on-exec.

    Whatever others do to its parts meanwhile, nothing outside of ``directory`` is opened, and no symlink is followed.
    Raises ``OSError``: ``ELOOP`` for a symlink, ``EXDEV`` for a path that leads outside. Needs Linux 5.6
    (``openat2``, fs/open.c; Documentation/filesystems/path-lookup.rst).
    """
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("a path with a zero byte")
    return check(lib.kvmpass_openat2(directory, encoded, flags | os.O_CLOEXEC, mode, _RESOLVE), "openat2", path)
