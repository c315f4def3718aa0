"""The host's end of a named port of a virtio console."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol


class PortUser(Protocol):
    """What a port is connected to. Called from vCPU threads, and from those that call the port: must not block."""

    def output(self, data: bytes) -> None:
        """Take what the guest writes."""

    def has_room(self) -> bool:
        """Whether ``output`` may be called. If not, the guest's data stays in its memory until ``Port.resume()``."""


class Port:
    """A port. The guest finds it by its name; it outlives the devices that a reset of the machine rebuilds.

    What is sent to the guest waits here until the guest reads it.

    Synchronization: from any thread; ``_changed`` guards what is sent. It is taken after the transport's lock.
    """

    def __init__(self, name: str, output: Callable[[bytes], None], has_room: Callable[[], bool]) -> None:
        self.name = name
        """Printable ASCII."""
        self.output = output
        """See ``PortUser``."""
        self.has_room = has_room
        """See ``PortUser``."""
        self._changed = threading.Condition(threading.Lock())
        self._waiting = bytearray()
        self._resets = 0
        self.on_send: Callable[[], None] = lambda: None
        """Set by the device: give the guest what was sent."""
        self.on_resume: Callable[[], bool] = lambda: False
        """Set by the device: take what the guest has written. Returns whether some of it is left."""
        self.ended = False
        """Whether nothing more is sent: the guest reads the end of the file after what waits."""

    def send(self, data: bytes) -> int:
        """Send ``data``. Return how many bytes the guest has not taken yet."""
        return self._send(None, data)

    def sender(self) -> Callable[[bytes], int]:
        """Return a ``send`` whose data is dropped once the port is reset: a later boot gets nothing of it."""
        with self._changed:
            return partial(self._send, self._resets)

    def _send(self, resets: int | None, data: bytes) -> int:
        with self._changed:
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

    def resume(self) -> bool:
        """Take what the guest has written, now that there is room. Return whether some of it is left."""
        return self.on_resume()

    def reset(self) -> None:
        """Drop what waits for the guest, and send again."""
        with self._changed:
            self._waiting.clear()
            self._resets += 1
            self._changed.notify_all()
        self.ended = False

    @property
    def waiting(self) -> int:
        """Bytes that the guest has not taken yet."""
        return len(self._waiting)

    def take(self, size: int) -> bytes:
        """Return at most ``size`` of the bytes that wait for the guest, and forget them."""
        with self._changed:
            data = bytes(self._waiting[:size])
            del self._waiting[:size]
            self._changed.notify_all()
        return data

    def wait_below(self, size: int, timeout: float) -> bool:
        """Wait until less than ``size`` bytes are left for the guest, ``timeout`` seconds at most; return whether."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._waiting) < size, timeout)
