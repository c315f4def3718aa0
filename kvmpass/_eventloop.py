"""A thread with an event loop, for work that must not be done in a vCPU's thread."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from kvmpass._log import Log

log = Log(__name__)


class EventLoop:
    """Calls back when a descriptor becomes readable, and runs functions, one at a time, in a thread of its own.

    The thread starts with the first use. An exception of a callback is logged, and the loop goes on. The queue of
    functions has no limit: callers ensure that no guest can fill it.

    Synchronization: from any thread; calls after ``close`` are dropped. ``_lock`` guards the thread's start and end,
    and the heap of functions; it is never held while a callback runs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}  # by descriptor
        self._calls: list[tuple[float, int, Callable[[], None]]] = []  # a heap: time, sequence number
        self._numbers = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` while ``fd`` is readable: it reads the descriptor, or removes it."""
        self._epoll.register(fd, select.EPOLLIN)  # a thread that waits already sees it
        self._readers[fd] = callback
        with self._lock:
            self._start()

    def remove_reader(self, fd: int) -> None:
        """Begin no callback for ``fd`` after this. Idempotent."""
        if self._readers.pop(fd, None) is not None:
            with suppress(OSError):  # it is closed: epoll has forgotten it
                self._epoll.unregister(fd)

    def call(self, function: Callable[[], None], seconds: float = 0.0) -> None:
        """Run ``function`` in the loop's thread after ``seconds``, or when the function that runs then returns."""
        with self._lock:
            if self._closing:
                return
            heapq.heappush(self._calls, (time.monotonic() + seconds, next(self._numbers), function))
            self._start()
            os.eventfd_write(self._wake, 1)

    def _start(self) -> None:
        """Start the thread. Idempotent; ``_lock`` is held."""
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def flush(self, seconds: float) -> None:
        """Wait until the functions that are due have run, at most ``seconds``; in a callback not at all."""
        if self._thread is None or self._thread is threading.current_thread() or self._closing:
            return
        done = threading.Event()
        self.call(done.set)
        done.wait(seconds)

    def close(self) -> None:
        """Wait for the callback that runs, and drop the others. A callback may call this."""
        with self._lock:
            self._closing = True
            os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._readers.clear()
        self._epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closing:
            for fd, _ in self._epoll.poll(self._until_due()):
                if self._closing:  # by a callback: the descriptors may have been reused
                    return
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                elif callback := self._readers.get(fd):
                    self._run_logged(callback)
            while not self._closing and self._until_due() == 0:
                with self._lock:
                    _, _, function = heapq.heappop(self._calls)
                self._run_logged(function)

    def _until_due(self) -> float | None:
        """Seconds until the first function is due; None without one."""
        with self._lock:
            return max(0.0, self._calls[0][0] - time.monotonic()) if self._calls else None

    @staticmethod
    def _run_logged(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            log.exception("a device event could not be handled")
