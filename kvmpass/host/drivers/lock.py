"""The lock under which drivers change: one process at a time, and it says who it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmpass.errors import JournalError

LOCK_TIMEOUT = 90.0  # seconds: longer than one holder's worst case for a device or two
PATIENCE = 1.0  # seconds of waiting without a word

Say = Callable[[str], object]


class HostLock:
    """flock(2) on a file that names its holder. The same object may take it again while it has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0

    @contextlib.contextmanager
    def hold(self, say: Say | None = None, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock. ``say`` is told for whom it waits, if that takes longer than a second.

        Raises ``JournalError`` after ``timeout`` seconds, ``PermissionError``.
        """
        if self._depth:
            yield
            return
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            error.add_note("run as root: taking and giving back devices changes drivers")
            raise
        try:
            self._wait(fd, LOCK_TIMEOUT if timeout is None else timeout, say)
            text = f"{os.getpid()} {_own_command()}\n".encode()
            with contextlib.suppress(OSError):  # a full disk: others do not learn the name, the lock holds
                os.pwrite(fd, text, 0)
                os.ftruncate(fd, len(text))  # afterwards: whoever reads it meanwhile finds a whole first line
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
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = time.monotonic() - started
            if waited > timeout:
                raise JournalError(
                    f"{_holder(fd)} has been changing drivers for {timeout:g} s (lock {self.path})",
                    "see what hangs: ps, dmesg; then try again",
                )
            if say is not None and waited > PATIENCE and told != (holder := _holder(fd)):
                with contextlib.suppress(OSError):  # a terminal that has gone must not keep a device from its driver
                    say(f"waiting for {holder}, which changes drivers")
                told = holder
            time.sleep(0.02)


def _holder(fd: int) -> str:
    """Who has the lock, as the file says; its last holder where the new one has not said so yet."""
    pid, _, command = os.pread(fd, 200, 0).decode(errors="replace").partition("\n")[0].partition(" ")
    return f"process {pid} ({command})" if pid.isdecimal() else "another kvmpass"


def _own_command() -> str:
    """``kvmpass bind 0000:01:00.0``, in 120 characters."""
    program = Path(sys.argv[0] if sys.argv else "python")
    name = program.parent.name if program.name == "__main__.py" else program.name
    text = " ".join([name or "python", *sys.argv[1:]])[:120]
    return "".join(character if character.isprintable() else "?" for character in text)
