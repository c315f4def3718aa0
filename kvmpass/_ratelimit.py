"""Rate limits for what a guest, a device or the kernel's log can repeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmpass._dataclass import dataclass
from kvmpass._log import Log

if TYPE_CHECKING:
    import logging

_WARNING = 30  # logging.WARNING
BURST, SECONDS = 10, 5.0  # those of the kernel (include/linux/ratelimit_types.h)


@dataclass(slots=True)
class _Window:
    begun: float
    passed: int = 0
    suppressed: int = 0


class RateLimit:
    """At most ``burst`` events in ``seconds`` for each key. Keys are never forgotten: there must be few.

    Synchronization: from any thread.
    """

    def __init__(
        self, burst: int = BURST, seconds: float = SECONDS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._seconds = seconds
        self._clock = clock
        self._windows: dict[Hashable, _Window] = {}
        self._lock = threading.Lock()

    def admit(self, key: Hashable) -> int | None:
        """Count an event. Return None if it is over the limit, else how many were since the last admitted one."""
        now = self._clock()
        with self._lock:
            window = self._windows.setdefault(key, _Window(now))
            if now - window.begun >= self._seconds:
                window.begun, window.passed = now, 0
            if window.passed >= self._burst:
                window.suppressed += 1
                return None
            window.passed += 1
            suppressed, window.suppressed = window.suppressed, 0
            return suppressed


class _LogLimit:
    """Limits warnings by their format string: there are as many keys as calls in the source."""

    def __init__(self) -> None:
        self._limit = RateLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < _WARNING:
            return True
        suppressed = self._limit.admit(record.msg)
        if suppressed:
            record.msg, record.args = f"{record.getMessage()} ({suppressed} similar messages suppressed)", None
        return suppressed is not None


def limited_log(name: str) -> Log:
    """Return the logger of a module whose warnings a guest or a device can repeat: rate-limited."""
    return Log(name, _LogLimit())


@contextmanager
def log_errors(log: Log, message: str, *args: object) -> Iterator[None]:
    """Log an ``OSError`` of the block as a warning, instead of raising it. It is the last argument of ``message``."""
    try:
        yield
    except OSError as error:
        log.warning(message, *args, error)
