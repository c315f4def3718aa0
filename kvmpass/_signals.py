"""Hold back Ctrl-C and termination while something is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class deferred:
    """Signals that arrive in the block are raised anew at its end. Does nothing outside of the main thread.

    Handlers are replaced rather than signals blocked: a blocked signal goes to another thread of the process, and
    Python then runs the handler in the main thread all the same.
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
