"""The input of a process in the guest."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmpass.guest.frames import DATA, END, INPUT, INPUT_WINDOW, MAX_PAYLOAD, encode


class Input:
    """Send bytes to the input of a process, as fast as it reads them. What waits is kept here.

    It can be sent to before the process is started, and given to another one when the guest reboots.

    Synchronization: from any thread; ``_changed`` guards all, and is not held while frames are sent.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._pending = bytearray()
        self._send: Callable[[bytes], object] | None = None
        self._process = 0
        self._credit = INPUT_WINDOW
        self._sending = False
        self._ending = False  # nothing more comes
        self._ended = False  # the guest knows
        self._dropping = False  # nobody reads it

    def detach(self) -> None:
        """Send to no process, until ``attach``. What waits is kept. Idempotent."""
        with self._changed:
            self._send, self._credit = None, INPUT_WINDOW
            self._ended = self._dropping = False

    def attach(self, process: int, send: Callable[[bytes], object]) -> None:
        """Send to ``process``, which is about to start, by frames. Detach first."""
        with self._changed:
            self._process, self._send = process, send
        self._flush()

    def send(self, data: bytes) -> int:
        """Send ``data``. Return how many bytes the process has not read yet. Dropped once nobody reads it."""
        with self._changed:
            if not (self._dropping or self._ending):
                self._pending += data
        self._flush()
        return self.waiting

    def end(self) -> None:
        """Send nothing more: the process reads the end of the file. Idempotent."""
        with self._changed:
            self._ending = True
        self._flush()

    @property
    def waiting(self) -> int:
        """Bytes that the process has not read yet."""
        with self._changed:
            return self._waiting()

    def wait_below(self, size: int, timeout: float) -> bool:
        """Wait until less than ``size`` bytes wait, ``timeout`` seconds at most; return whether."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting() < size, timeout)

    def _waiting(self) -> int:
        on_the_way = INPUT_WINDOW - self._credit if self._send is not None else 0
        return 0 if self._dropping else len(self._pending) + on_the_way

    def granted(self, size: int) -> bool:
        """Note that the process has read ``size`` bytes. Return whether so many were on the way."""
        with self._changed:
            self._credit += size
            if self._credit > INPUT_WINDOW:
                return False
            self._changed.notify_all()
        self._flush()
        return True

    def drop(self) -> None:
        """Drop what waits, and what comes: nobody reads it. Idempotent."""
        with self._changed:
            self._dropping = True
            self._pending.clear()
            self._changed.notify_all()

    def _flush(self) -> None:
        """Send what may be sent. One thread at a time does it, which keeps the order."""
        while True:
            with self._changed:
                frames = self._next_frames() if not self._sending else None
                if frames is None:
                    return
                send, self._sending = self._send, True
            assert send is not None
            try:
                send(frames)
            finally:
                with self._changed:
                    self._sending = False

    def _next_frames(self) -> bytes | None:
        if self._send is None or self._dropping or self._ended:
            return None
        # Whole frames: the rest of a grant is not worth one. The agent grants all once nothing waits there.
        parts, at = list[bytes](), 0
        with memoryview(self._pending) as pending:
            while 0 < (size := min(len(pending) - at, MAX_PAYLOAD)) <= self._credit:
                parts.append(encode(self._process, DATA, pending[at : at + size], INPUT))
                self._credit -= size
                at += size
        if parts:
            del self._pending[:at]
            return b"".join(parts)
        if self._ending and not self._pending:
            self._ended = True
            return encode(self._process, END, b"", INPUT)
        return None
