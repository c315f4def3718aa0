"""Real daemons of virtio devices, started for a test: QEMU's old virtiofsd, and its storage daemon."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
"""That of qemu-system-common 7.2."""


@contextmanager
def listening(path: Path, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a daemon with a socket that listens at ``path``, whose descriptor stands for ``{fd}``; kill it after."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen(1)
    with listener:
        fd = listener.fileno()
        process = subprocess.Popen([word.replace("{fd}", str(fd)) for word in words], pass_fds=[fd])
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


@contextmanager
def virtiofsd(directory: Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Share ``directory`` at the socket ``path``, without confinement: for tests of the front end."""
    if not VIRTIOFSD.exists():
        pytest.skip(f"{VIRTIOFSD} is missing: apt install qemu-system-common of Debian 12")
    words = [str(VIRTIOFSD), "--fd={fd}", "-o", f"source={directory}", "-o", "sandbox=chroot", "-o", "xattr"]
    with listening(path, words) as process:
        yield process
