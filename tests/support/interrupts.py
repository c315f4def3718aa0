"""Ctrl-C while the main thread waits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_AGAIN_SECONDS = 10.0


@contextmanager
def interrupted(seconds: float = 0.3) -> Iterator[None]:
    """Interrupt the body after ``seconds``. It must raise ``KeyboardInterrupt``, and not wait for a second Ctrl-C.

    For tests that use ``usual_signals``.
    """
    main = threading.main_thread().ident
    assert main is not None
    sent: list[float] = []

    def send() -> None:
        sent.append(seconds)
        signal.pthread_kill(main, signal.SIGINT)

    timers = [threading.Timer(after, send) for after in (seconds, _AGAIN_SECONDS)]
    for timer in timers:
        timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
    assert len(sent) == 1
