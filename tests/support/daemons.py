"""Real daemons of virtio devices, started for a test: QEMU's old virtiofsd, and its storage daemon."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpass.virtio.frontend import FrontEnd
from kvmpass.virtio.remote import RemoteDevice

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


STORAGE_DAEMON = Path("/usr/bin/qemu-storage-daemon")


@contextmanager
def storage_daemon(image: Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Export the raw ``image`` as a vhost-user-blk device at the socket ``path``. It listens again and again."""
    if not STORAGE_DAEMON.exists():
        pytest.skip(f"{STORAGE_DAEMON} is missing: apt install qemu-system-common")
    export = f"type=vhost-user-blk,id=disk,node-name=file,writable=on,addr.type=unix,addr.path={path}"
    words = [str(STORAGE_DAEMON), "--blockdev", f"driver=file,node-name=file,filename={image}", "--export", export]
    process = subprocess.Popen(words)
    try:
        while not path.exists():
            assert process.poll() is None, "it has ended"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def block_device(front: FrontEnd) -> RemoteDevice:
    """A virtio drive whose configuration the daemon has (Virtual I/O Device 1.2, section 5.2)."""
    flush, segments, block_size = 1 << 9, 1 << 2, 1 << 6
    return RemoteDevice(
        front,
        device_type=2,
        class_code=0x010000,
        features=flush | segments | block_size,
        queues=(128,),
        config=front.config(60),
    )


BLOCK_MODALIAS = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00"
