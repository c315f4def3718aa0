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
        self._line = self._sent = b""
        self._requested = False

    def set(self, rows: int, columns: int) -> None:
        """Set the size."""
        with self._lock:
            self._line = b"%d %d\n" % (rows, columns)
            self._answer()

    def requested(self) -> None:
        """Answer a request of the guest, now or when the size changes."""
        with self._lock:
            self._requested = True
            self._answer()

    def reset(self) -> None:
        """Drop the guest's request, and what was sent, on guest reboot."""
        with self._lock:
            self._requested, self._sent = False, b""

    def _answer(self) -> None:
        if self._requested and self._line != self._sent and not self._push(b""):
            self._requested, self._sent = False, self._line
            self._push(self._line)
