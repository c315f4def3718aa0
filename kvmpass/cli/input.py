"""Standard input for a command in the guest."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpass.session.streams import InputLike

_CHUNK = 1 << 16
_BACKLOG = 1 << 18  # bytes that the command has not read


@contextmanager
def passed_input(input: InputLike) -> Iterator[None]:
    """Send standard input to ``input`` until its end, as fast as the guest reads, in a thread of its own."""
    fd = sys.stdin.fileno()
    done, wake = os.pipe()

    def read() -> None:
        while done not in select.select([fd, done], [], [])[0]:
            try:
                data = os.read(fd, _CHUNK)
            except OSError:  # the terminal has gone
                data = b""
            if not data:
                input.end()
                return
            input.send(data)
            while not input.wait_below(_BACKLOG, 0.1):
                if select.select([done], [], [], 0)[0]:
                    return

    thread = threading.Thread(target=read, name="input", daemon=True)
    try:
        thread.start()
        yield
    finally:
        os.write(wake, b".")
        thread.join()
        for end in (done, wake):
            os.close(end)


class PipedInput:
    """Standard input for the process of a guest that stays: a pipe, whose other end is sent to it.

    What passes a terminal is this process, which its shell can stop. ``close`` it.

    Synchronization: one thread at a time.
    """

    def __init__(self) -> None:
        self.source, self._target = os.pipe()
        os.set_blocking(self._target, False)
        self._pending = bytearray()
        self._ending = False

    def sent(self) -> None:
        """Close the end that was sent: the other process alone reads the pipe."""
        os.close(self.source)
        self.source = -1

    def send(self, data: bytes) -> int:
        """Write ``data``, and what could not be written before; return more than any limit while some is left."""
        self._pending += data
        try:
            while self._pending:
                del self._pending[: os.write(self._target, self._pending)]
        except BlockingIOError:
            return len(self._pending) + _BACKLOG
        except OSError:  # nobody reads it any more
            self._pending.clear()
        if self._ending:
            self._close_target()
        return 0

    def wait_below(self, size: int, timeout: float) -> bool:
        """Wait until it is written, ``timeout`` seconds at most; return whether."""
        if self._target >= 0:
            select.select([], [self._target], [], timeout)
        return self.send(b"") < size

    def end(self) -> None:
        """Send nothing more."""
        self._ending = True
        self.send(b"")

    def _close_target(self) -> None:
        if self._target >= 0:
            os.close(self._target)
            self._target = -1

    def close(self) -> None:
        """Close both ends. Idempotent."""
        self._close_target()
        if self.source >= 0:
            self.sent()
