"""The console of a guest that stays: its log, and the terminals that are attached to it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvmpass._log import Log
from kvmpass._teardown import undo_on_error
from kvmpass.errors import GuestDied, GuestError
from kvmpass.guest.output import Outlet, OutputWriter, Sink
from kvmpass.initramfs import init
from kvmpass.session.directory import CONSOLE, NEWER_CONSOLE, OLDER_CONSOLE
from kvmpass.session.streams import Cancel, InputPump, write_to

if TYPE_CHECKING:
    from kvmpass.session.process import GuestProcess
    from kvmpass.session.session import Session

log = Log(__name__)

MAX_LOG = 8 << 20
"""Bytes of each of the two files that have the log."""
_RESIZE_SECONDS = 10.0
# The agent makes a session for it; setsid(1) would fork, and the process that is watched would end at once.
_SHELL = "exec cttyhack sh {} </dev/ttyS0 >/dev/ttyS0 2>&1"


class Console:
    """Keep what the console prints, pass it on to ``also``, and show it on attached terminals. ``close`` it.

    Synchronization: called with output by one thread; ``attached`` and ``resize`` from any. ``_lock`` guards the set
    of those attached, ``_starting`` the shell: a guest that does not start one delays no output.
    """

    def __init__(self, directory: Path, also: Sink | None = None) -> None:
        self._path, self._older = directory / CONSOLE, directory / OLDER_CONSOLE
        self._file = self._path.open("wb", buffering=0)
        self._size = 0
        self._also = also
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._attached: list[Outlet] = []
        self._shell: GuestProcess | None = None
        self.session: Session | None = None
        """Set once the guest runs."""

    def __call__(self, data: bytes) -> None:
        """Take what the console has printed. A terminal that stalls misses some of it."""
        with contextlib.suppress(OSError):  # the disk is full, or no descriptor is free: the log lacks this
            if self._size + len(data) > MAX_LOG:
                self._rotate()
            self._file.write(data)
            self._size += len(data)
        if self._also is not None:
            self._also(data)
        with self._lock:
            outlets = [*self._attached]
        for outlet in outlets:
            if not outlet.full:
                outlet(data)

    def _rotate(self) -> None:
        """Begin another file. Raises ``OSError``, and then the log stays as it is: the next output tries again."""
        made = self._path.with_name(NEWER_CONSOLE)
        newer = made.open("wb", buffering=0)
        with undo_on_error(newer.close):
            with contextlib.suppress(FileNotFoundError):  # the step after it has failed before
                self._path.replace(self._older)
            made.replace(self._path)
        older, self._file, self._size = self._file, newer, 0
        older.close()

    @contextlib.contextmanager
    def attached(self, source: int, target: int) -> Iterator[None]:
        """Type what the descriptor ``source`` has, and write what the console prints to ``target``."""
        with contextlib.closing(Cancel()) as cancel:
            writer = OutputWriter(lambda: None, lambda: False)
            outlet = writer.to(lambda data: _write(target, cancel, data))
            with self._lock:
                self._attached.append(outlet)
            pump = None
            try:
                self._start_shell()
                pump = InputPump(os.dup(source), _Keyboard(self), cancel)
                yield
            finally:
                with self._lock:
                    self._attached.remove(outlet)
                cancel.set()
                writer.close()
                if pump is not None:
                    pump.join()

    def _start_shell(self) -> None:
        """Run a shell on the console, unless one runs there, the console is another init's, or the guest hangs.

        The kernel of a guest that hangs may print on its console, and read from it. Raises ``GuestDied``, and what
        else starting it raises.
        """
        assert self.session is not None
        if self.session.own_init:
            return
        with self._starting:
            if self._shell is not None and self._shell.poll() is not None:
                self._shell.wait()  # closes what belongs to it
                self._shell = None
            if self._shell is None:
                what = "-l" if self.session.entry is None else f"{init.DIRECTORY}/command"
                try:
                    self._shell = self.session.outside(["sh", "-c", _SHELL.format(what)])
                except GuestDied:
                    raise
                except GuestError:
                    if self.session.answering:
                        raise

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the console's terminal, if the guest can do so just now. Raises ``GuestDied``."""
        assert self.session is not None
        size = ["rows", str(rows), "cols", str(columns)]
        try:
            process = self.session.outside(["stty", "-F", "/dev/ttyS0", *size], timeout=_RESIZE_SECONDS)
            try:
                process.wait(_RESIZE_SECONDS)
            finally:
                process.abandon()
        except GuestDied:
            raise
        except (GuestError, OSError, subprocess.TimeoutExpired) as error:
            log.debug("the size of the console was not set: %s", error)

    def type(self, data: bytes) -> int:
        """Send keystrokes; return how many bytes the guest has not read yet."""
        return self.session.send_keys(data) if self.session is not None else 0

    def close(self) -> None:
        """Close the log. Idempotent."""
        self._file.close()


def _write(fd: int, cancel: Cancel, data: bytes) -> None:
    write_to(fd, cancel, data)


class _Keyboard:
    """Passes keystrokes to a console, as the input of a process."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def send(self, data: bytes) -> int:
        return self._console.type(data)

    def wait_below(self, size: int, timeout: float) -> bool:
        if self._console.type(b"") < size:
            return True
        threading.Event().wait(timeout)
        return False

    def end(self) -> None:
        pass
