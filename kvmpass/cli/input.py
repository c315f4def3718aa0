"""Standard input for a command in the guest."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpass.session.streams import BACKLOG, Cancel, InputLike, InputPump


@contextmanager
def passed_input(input: InputLike) -> Iterator[None]:
    """Send standard input to ``input`` until its end, as fast as the guest reads, in a thread of its own."""
    cancel = Cancel()
    try:
        pump = InputPump(os.dup(sys.stdin.fileno()), input, cancel)
        try:
            yield
        finally:
            cancel.set()
            pump.join()
    finally:
        cancel.close()


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
            return len(self._pending) + BACKLOG
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
