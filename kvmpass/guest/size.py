"""The size of the console's terminal, on its way to the guest.

The guest's init asks for it (``kvmpass 1 size`` on the control channel) and gets one line, ``ROWS COLUMNS``: at once
if it is new, else when it changes. Then it asks again. So no more than one line waits for a guest, whatever it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class ConsoleSize:
    """``push`` hands bytes to the guest's side of the channel and returns how many it has yet to take.

    Synchronization: from any thread; ``push`` is called with the object's lock held.
    """

    def __init__(self, push: Callable[[bytes], int]) -> None:
        self._push = push
        self._lock = threading.Lock()
        self._size: tuple[int, int] | None = None
        self._told: tuple[int, int] | None = None
        self._asked = False

    def set(self, rows: int, columns: int) -> None:
        """The terminal has this size now."""
        with self._lock:
            self._size = rows, columns
            self._answer()

    def asked(self) -> None:
        """The guest waits for a size that it has not been told."""
        with self._lock:
            self._asked = True
            self._answer()

    def forget(self) -> None:
        """The guest starts again: it has neither asked nor been told anything."""
        with self._lock:
            self._asked, self._told = False, None

    def _answer(self) -> None:
        if not self._asked or self._size in (None, self._told) or self._push(b""):
            return
        self._asked, self._told = False, self._size
        assert self._size is not None
        self._push(b"%d %d\n" % self._size)
