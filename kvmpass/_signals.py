"""Defer termination signals during an operation that must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGINT, SIGTERM, SIGHUP and SIGQUIT to the end of the block. Does nothing outside of the main thread.

    Handlers are replaced instead of signals blocked: a blocked signal is delivered to another thread of the process,
    and Python then runs its handler in the main thread nevertheless.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number not in seen:
            seen.append(number)

    undo = ExitStack()
    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None:  # None: installed by C code, not ours to replace
                undo.callback(signal.signal, number, handler)
                signal.signal(number, note)
        yield
    finally:
        undo.close()
        for received in seen:
            signal.raise_signal(received)
