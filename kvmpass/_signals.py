"""Defer termination signals during an operation that must not be interrupted."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class deferred:
    """Defer SIGINT, SIGTERM, SIGHUP and SIGQUIT to the end of the block. Does nothing outside of the main thread.

    Handlers are replaced instead of signals blocked: a blocked signal is delivered to another thread of the process,
    and Python then runs its handler in the main thread nevertheless.
    """

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._seen: list[int] = []

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._seen:
            self._seen.append(number)

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None:  # None: installed by C code, not ours to replace
                self._undo.callback(signal.signal, number, handler)
                signal.signal(number, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        while self._seen:
            signal.raise_signal(self._seen.pop(0))
