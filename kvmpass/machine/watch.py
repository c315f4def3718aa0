"""A thread that waits for descriptors, and does what must not be done in a vCPU's thread."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Watch:
    """Calls back when a descriptor becomes readable, and runs functions given to it, one at a time.

    The thread starts with the first use. A callback that raises is logged; the watch goes on. Functions wait in a
    queue without limit: whoever gives them sees to it that no guest can repeat that.

    Synchronization: from any thread; what comes after ``close`` is dropped. ``_lock`` guards the thread's start and
    end, and what waits for its time; it is never held while a callback runs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # a heap: when, which first, what
        self._given = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """``callback`` reads the descriptor, or removes it."""
        self._selector.register(fd, selectors.EVENT_READ, callback)
        self.call(lambda: None)

    def remove(self, fd: int) -> None:
        """No callback for ``fd`` begins after this. Harmless if it is not watched."""
        try:
            self._selector.unregister(fd)
        except KeyError:
            return

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the watch's thread, soon."""
        self._calls.put(function)
        self._notice()

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Run ``function`` in the watch's thread in ``seconds``, or as soon as what runs then has ended."""
        with self._lock:
            heapq.heappush(self._later, (time.monotonic() + seconds, next(self._given), function))
        self._notice()

    def _notice(self) -> None:
        with self._lock:
            if self._closing:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Wait for what runs, drop what waits. From a callback it does not wait for itself."""
        with self._lock:
            self._closing = True
            os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._selector.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closing:
            ready = [key for key, _ in self._selector.select(self._until_due())]
            for key in ready:
                if self._closing:  # by a callback: the descriptors may be somebody else's by now
                    return
                if key.fd == self._wake:
                    os.eventfd_read(self._wake)
                elif key.fd in self._selector.get_map():
                    self._guarded(key.data)
            while not self._closing and not self._calls.empty():
                self._guarded(self._calls.get())
            while not self._closing and self._until_due() == 0:
                with self._lock:
                    _, _, function = heapq.heappop(self._later)
                self._guarded(function)

    def _until_due(self) -> float | None:
        """Seconds until the first function's time; None if none waits."""
        with self._lock:
            return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    @staticmethod
    def _guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            log.exception("a device event could not be handled")
