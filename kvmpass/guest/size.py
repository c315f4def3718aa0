"""The size of the console's terminal, sent to the guest.

The guest's init requests it (``kvmpass 1 size`` on the control channel) and gets one line, ``ROWS COLUMNS``: at once
if the size is new, else when it changes. Then it requests again. So at most one line is pending, whatever a guest
does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class ConsoleSize:
    """Answer the guest's requests. ``push`` sends bytes to the guest and returns how many it has not read yet.

    Synchronization: from any thread; ``push`` is called with the object's lock held.
    """

    def __init__(self, push: Callable[[bytes], int]) -> None:
        self._push = push
        self._lock = threading.Lock()
        self._size: tuple[int, int] | None = None
        self._sent: tuple[int, int] | None = None
        self._requested = False

    def set(self, rows: int, columns: int) -> None:
        """Set the size."""
        with self._lock:
            self._size = rows, columns
            self._answer()

    def requested(self) -> None:
        """Answer a request of the guest, now or when the size changes."""
        with self._lock:
            self._requested = True
            self._answer()

    def reset(self) -> None:
        """Drop the guest's request, and what was sent, on guest reboot."""
        with self._lock:
            self._requested, self._sent = False, None

    def _answer(self) -> None:
        if not self._requested or self._size in (None, self._sent) or self._push(b""):
            return
        self._requested, self._sent = False, self._size
        assert self._size is not None
        self._push(b"%d %d\n" % self._size)
