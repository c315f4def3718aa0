"""Limits on what a guest, a device or the kernel's log can repeat."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

BURST, SECONDS = 10, 5.0  # those of the kernel (include/linux/ratelimit_types.h)


@dataclass(slots=True)
class _Window:
    begun: float
    passed: int = 0
    held_back: int = 0


class RateLimit:
    """At most ``burst`` in ``seconds`` for each key, of which there are few. Synchronization: from any thread."""

    def __init__(
        self, burst: int = BURST, seconds: float = SECONDS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._seconds = seconds
        self._clock = clock
        self._windows: dict[Hashable, _Window] = {}
        self._lock = threading.Lock()

    def admit(self, key: Hashable) -> int | None:
        """None where ``key`` has come too often; else how many have been held back since the last that passed."""
        now = self._clock()
        with self._lock:
            window = self._windows.setdefault(key, _Window(now))
            if now - window.begun >= self._seconds:
                window.begun, window.passed = now, 0
            if window.passed >= self._burst:
                window.held_back += 1
                return None
            window.passed += 1
            held_back, window.held_back = window.held_back, 0
            return held_back


class _LogLimit(logging.Filter):
    """Limits warnings by their format, so that the number of keys is that of the calls in the source."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        held_back = self._limit.admit(record.msg)
        if held_back:
            record.msg, record.args = f"{record.getMessage()} ({held_back} more like it before)", None
        return held_back is not None


def limited_log(name: str) -> logging.Logger:
    """The logger of a module that warns of what a guest or a device does: as often as it likes."""
    log = logging.getLogger(name)
    if not any(isinstance(known, _LogLimit) for known in log.filters):
        log.addFilter(_LogLimit())
    return log
