"""The interrupts of a virtio function: one vector for each reason, or one for several."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvmpass.virtio.signals import Signals

USED_BUFFER, CONFIG_CHANGE = 1, 2
"""Reasons: bits of the ISR status (Virtual I/O Device 1.2, section 4.1.4.5)."""


class VectorSink:
    """An ``InterruptSink`` with ``count`` vectors, which the device signals; and the ISR status.

    Synchronization: from any thread; ``_lock`` guards the eventfds. Only that of ``Signals`` is taken under it.
    """

    resizable = True

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        """The device, for the log."""
        self.count = count
        """Number of vectors."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when another eventfd is to be signalled for a vector, or none."""
        self._lock = threading.Lock()
        self._eventfds: dict[int, int] = {}
        self._reasons = 0
        self._signals: Signals | None = None  # once somebody else has had an eventfd

    def set_irqs(self, start: int, eventfds: Sequence[int]) -> None:
        """See ``InterruptSink``."""
        with self._lock:
            self._eventfds |= {vector: fd for vector, fd in enumerate(eventfds, start) if fd >= 0}
        self.on_change()

    def disable_irqs(self) -> None:
        """See ``InterruptSink``."""
        with self._lock:
            self._eventfds.clear()
        self.on_change()

    def duplicate(self, vector: int, signals: Signals) -> int:
        """Return a duplicate of the eventfd of ``vector``, for another process to signal; -1 while it is disabled.

        From now on every vector is signalled by ``signals``. Raises ``OSError`` (``EMFILE``).
        """
        with self._lock:
            self._signals = signals
            eventfd = self._eventfds.get(vector, -1)
            return os.dup(eventfd) if eventfd >= 0 else -1

    def signal(self, reason: int, vector: int) -> None:
        """Signal ``vector``, if it is enabled, for ``reason``."""
        with self._lock:
            self._reasons |= reason
            if (eventfd := self._eventfds.get(vector, -1)) >= 0:
                if self._signals is not None:
                    self._signals.send(("vector", vector), eventfd)
                else:
                    with suppress(BlockingIOError):  # a full counter is a signal already
                        os.eventfd_write(eventfd, 1)

    def signal_queue(self, vector: int) -> None:
        """Signal that a queue has used buffers."""
        self.signal(USED_BUFFER, vector)

    def take_reasons(self) -> int:
        """Return the ISR status, and clear it."""
        with self._lock:
            reasons, self._reasons = self._reasons, 0
        return reasons
