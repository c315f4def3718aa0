"""Writes that may wait: another process makes them, and says what the kernel has answered."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvmpass.host import Sysfs


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_the_text_is_written_in_one_call(tmp_path: Path, timeout: float | None) -> None:
    place = tmp_path / "unbind"
    place.touch()
    Sysfs().write(place, "0000:01:00.0\n", timeout)
    assert place.read_text() == "0000:01:00.0\n"


def test_a_write_that_fails() -> None:
    """/dev/full answers each write like a driver that refuses a device."""
    with pytest.raises(OSError, match="I/O error") as caught:
        Sysfs().write(Path("/dev/full"), "0000:01:00.0", 30.0)
    assert caught.value.filename == "/dev/full"


def test_no_answer(tmp_path: Path) -> None:
    """The process that waits in the kernel keeps the lock of the device, also after nobody waits for it any more."""
    place, lock = tmp_path / "unbind", tmp_path / "lock"
    os.mkfifo(place)  # to open it waits for a reader
    held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    with pytest.raises(TimeoutError, match=r"no answer from the kernel in 0\.1 s"):
        Sysfs().write(place, "x", 0.1, held)
    os.close(held)
    holders = [fd for fd in Path("/proc").glob("[0-9]*/fd/*") if _target(fd) == str(lock)]
    assert len(holders) == 1
    reader = os.open(place, os.O_RDONLY)
    assert os.read(reader, 10) == b"x"
    os.close(reader)


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.EACCES, errno.ESRCH, errno.EPERM)
        return ""
