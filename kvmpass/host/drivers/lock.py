"""Locks for changes of drivers: one for the host, which names its holder, and one for each device."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmpass.errors import JournalError, KvmpassError, NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import Sysfs

LOCK_TIMEOUT = 90.0  # seconds: longer than one holder's worst case for a device or two
PATIENCE = 1.0  # seconds to wait before ``say`` is called

Say = Callable[[str], object]
"""Receives a line for the user when a lock is held by another process for longer than a second."""


class HostLock:
    """A lock by flock(2) on a file that names its holder; recursive.

    Synchronization: for one thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0

    @contextlib.contextmanager
    def hold(self, say: Say | None = None, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock. After a second of waiting ``say`` receives the holder.

        Raises ``JournalError`` after ``timeout`` seconds (default :data:`LOCK_TIMEOUT`), ``PermissionError``.
        """
        if self._depth:
            yield
            return
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            error.add_note("run as root: this changes drivers of devices")
            raise
        try:
            self._wait(fd, LOCK_TIMEOUT if timeout is None else timeout, say)
            text = f"{os.getpid()} {_own_command()}\n".encode()
            with contextlib.suppress(OSError):  # a full disk: the file does not name the holder, the lock is held
                os.pwrite(fd, text, 0)
                os.ftruncate(fd, len(text))  # last: a concurrent reader finds a whole first line
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
        finally:
            os.close(fd)

    def _wait(self, fd: int, timeout: float, say: Say | None) -> None:
        started = time.monotonic()
        told = ""
        while not _try_lock(fd):
            waited = time.monotonic() - started
            if waited > timeout:
                raise JournalError(
                    f"{_holder(fd)} has been changing drivers for {timeout:g} s (lock {self.path})",
                    "see why it hangs: ps, dmesg; then try again",
                )
            if say is not None and waited > PATIENCE and told != (holder := _holder(fd)):
                with contextlib.suppress(OSError):  # a closed terminal must not abort the operation
                    say(f"waiting for {holder}, which changes drivers")
                told = holder
            time.sleep(0.02)


@contextlib.contextmanager
def device_lock(sysfs: Sysfs, bdf: Bdf, timeout: float) -> Iterator[int]:
    """Wait until no earlier change of the device's driver is in progress in the kernel, and block other processes.

    A write to sysfs outlives the process that is killed during it: the driver could change again after it was read.
    Yields the locked descriptor, which the writing process keeps open. Raises ``TimeoutError`` after ``timeout``
    seconds; ``NoSuchDevice`` instead of any error if the device was removed.
    """
    gone = f"there is no PCI device {bdf} any more"
    path = sysfs.device_path(bdf)
    try:
        try:  # a file that only root may open, or any user could lock root out; nothing is written to it
            fd = os.open(path / "remove", os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # virtual functions have none
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NoSuchDevice(gone) from None
    try:
        deadline = time.monotonic() + timeout
        while not _try_lock(fd):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    errno.ETIMEDOUT, "an earlier change of its driver is still in progress in the kernel", str(bdf)
                )
            time.sleep(0.01)
        yield fd
    except (OSError, KvmpassError) as error:
        if not path.exists():
            raise NoSuchDevice(gone) from error
        if isinstance(error, OSError):
            error.add_note(f"while the driver of {bdf} was changed")
        raise
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> str:
    """Return the holder named by the file; the previous one if the new one has not written its name yet."""
    pid, _, command = os.pread(fd, 200, 0).decode(errors="replace").partition("\n")[0].partition(" ")
    return f"process {pid} ({command})" if pid.isdecimal() else "another kvmpass"


def _own_command() -> str:
    """``kvmpass bind 0000:01:00.0``, in 120 characters."""
    program = Path(sys.argv[0] if sys.argv else "python")
    name = program.parent.name if program.name == "__main__.py" else program.name
    text = " ".join([name or "python", *sys.argv[1:]])[:120]
    return "".join(character if character.isprintable() else "?" for character in text)
