"""The host's end of a named port of a virtio console."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial


class Port:
    """A port. The guest finds it by its name; it outlives the devices that a reset of the machine rebuilds.

    ``output`` is called with what the guest writes, from the threads that serve its queue: it must not block, and
    bounds what it keeps. What is sent to the guest waits here until the guest reads it.

    Synchronization: from any thread; ``_lock`` guards what is sent. It is taken after the transport's lock.
    """

    def __init__(self, name: str, output: Callable[[bytes], None]) -> None:
        self.name = name
        """Printable ASCII."""
        self.output = output
        """See above."""
        self._lock = threading.Lock()
        self._waiting = bytearray()
        self._resets = 0
        self.on_send: Callable[[], None] = lambda: None
        """Set by the device: give the guest what was sent."""
        self.on_receive: Callable[[], None] = lambda: None
        """Set by the device: call ``output`` with what the guest has written so far, before the thread does."""
        self.on_open: Callable[[], None] = lambda: None
        """Called when a program of the guest has opened it. It must not block."""
        self.on_close: Callable[[], None] = lambda: None
        """Called when the guest's program has closed it, or has ended. It must not block."""
        self.ended = False
        """Whether nothing more is sent: the guest reads the end of the file after what waits."""

    def send(self, data: bytes) -> int:
        """Send ``data``. Return how many bytes the guest has not taken yet."""
        return self._send(None, data)

    def sender(self) -> Callable[[bytes], int]:
        """Return a ``send`` whose data is dropped once the port is reset: a later boot gets nothing of it."""
        with self._lock:
            return partial(self._send, self._resets)

    def _send(self, resets: int | None, data: bytes) -> int:
        with self._lock:
            if resets not in (None, self._resets):
                return 0
            self._waiting += data
        if data:
            self.on_send()
        return len(self._waiting)

    def end(self) -> None:
        """Send nothing more. Idempotent."""
        self.ended = True
        self.on_send()

    def reset(self) -> None:
        """Drop what waits for the guest, and send again."""
        with self._lock:
            self._waiting.clear()
            self._resets += 1
        self.ended = False

    @property
    def waiting(self) -> int:
        """Bytes that the guest has not taken yet."""
        return len(self._waiting)

    def take(self, size: int) -> bytes:
        """Return at most ``size`` of the bytes that wait for the guest, and forget them."""
        with self._lock:
            with memoryview(self._waiting) as waiting:
                data = waiting[:size].tobytes()
            del self._waiting[:size]
        return data
