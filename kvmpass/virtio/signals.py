"""Signals to a daemon: writes to eventfds that it has, too."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from contextlib import suppress
from functools import partial

from kvmpass._ratelimit import limited_log, log_errors
from kvmpass._teardown import run_all

log = limited_log(__name__)

_CLOSE_SECONDS = 1.0  # for the write that is under way


class Signals:
    """Signals eventfds that another process shares.

    That process can fill the counter and clear ``O_NONBLOCK``, which belongs to the file description: the write then
    blocks until somebody reads the counter (fs/eventfd.c). So a thread writes that nobody waits for, and only what
    goes to the same process waits. The thread ends when there is nothing to write.

    Synchronization: from any thread. ``_lock`` guards what waits; it is not held during a write, and no other lock is
    taken under it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, int] = {}  # duplicates
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, key: Hashable, eventfd: int) -> None:
        """Signal ``eventfd``, without blocking; the caller may close it then. Dropped after ``close``.

        It replaces a signal with the same ``key`` that still waits: no more wait than there are keys.
        """
        with self._lock, log_errors(log, "%s: %s", self._name):
            if self._closed:
                return
            new = os.dup(eventfd)
            if (old := self._waiting.pop(key, -1)) >= 0:
                os.close(old)
            self._waiting[key] = new
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                eventfd = self._waiting.pop(next(iter(self._waiting)))
            with suppress(BlockingIOError):  # a full counter is a signal already
                os.eventfd_write(eventfd, 1)
            os.close(eventfd)

    def close(self) -> None:
        """Drop what waits. A write that blocks keeps its thread until the counter is read. Idempotent."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, {}
            thread = self._thread
        run_all(*(partial(os.close, eventfd) for eventfd in waiting.values()))
        if thread is not None:
            thread.join(_CLOSE_SECONDS)
