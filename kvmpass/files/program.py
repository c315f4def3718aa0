"""The program that serves files: virtiofsd."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

PLACES = (
    "usr/libexec/virtiofsd",  # Debian 13, Fedora: the daemon in Rust
    "usr/lib/qemu/virtiofsd",  # Debian 12: QEMU's, in C
    "usr/lib/virtiofsd",  # Arch
    "usr/local/libexec/virtiofsd",
)
"""Where it is looked for, in this order, without the leading slash."""
_QUIET = "--no-announce-submounts"
INSTALL = "install it: Debian 13 and Fedora have a package virtiofsd, on Debian 12 qemu-system-common has it"
"""What to do if it is not found."""


def _exists(place: str) -> bool:
    return os.path.exists(f"/{place}")  # noqa: PTH110 - a Path raises where the user may not search a directory


def find_daemon(exists: Callable[[str], bool] = _exists) -> Path | None:
    """Return the path of virtiofsd; None: not installed. ``exists`` looks for a file below the root of a host."""
    return next((Path("/", place) for place in PLACES if exists(place)), None)


def arguments(program: Path, listener: int, source: str) -> tuple[str, ...]:
    """Return the command line. ``listener``: the descriptor of a socket that listens; ``source``: the directory.

    In options that both know: QEMU's virtiofsd in C (7.2, tools/virtiofsd/helper.c), and the one in Rust, which takes
    those of the older one as ``-o``. ``chroot``: the namespaces are made already, and the daemon's ``pivot_root``
    fails where the root is an initramfs. The limit for descriptors is set already, too. The newer one announces
    mount points unless told otherwise: an overlay does not enter a directory that would be mounted when it is entered
    (``EREMOTE``; fs/overlayfs/namei.c).
    """
    try:
        announces = _QUIET.removeprefix("--").encode() in program.read_bytes()  # faster than to ask it
    except OSError:
        announces = False  # confine.c says why it cannot be run
    options = ("-o", f"source={source},sandbox=chroot")
    return (str(program), f"--fd={listener}", "--rlimit-nofile=0", *options, *((_QUIET,) if announces else ()))
