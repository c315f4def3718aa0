"""Termination signals: as exceptions, and deferred during an operation that must not be interrupted."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AGAIN_SECONDS = 0.01
_deferring = False  # whether a block of ``deferred`` runs; of the main thread


def raise_at_signals() -> None:
    """Let SIGINT raise ``KeyboardInterrupt`` from now on, and the others ``SystemExit``: everything is undone.

    A signal that is ignored (nohup) stays so. What is raised in a finalizer, or in a callback of an import, Python
    prints and drops: it is raised again. Uses SIGALRM and ``sys.unraisablehook``. Main thread only.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _terminate)
    if not isinstance(sys.unraisablehook, _RaisedAgain):
        sys.unraisablehook = _RaisedAgain(sys.unraisablehook)


class _Terminated(SystemExit):
    """What a signal other than SIGINT raises."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated(number)


class _RaisedAgain:
    """A hook for exceptions that Python drops; all but those of signals are for ``others``."""

    def __init__(self, others: Callable[[sys.UnraisableHookArgs], object]) -> None:
        self._others = others
        self._again: list[int] = []

    def __call__(self, dropped: sys.UnraisableHookArgs) -> None:
        number = _signal_of(dropped.exc_value)
        if number is None or threading.current_thread() is not threading.main_thread():
            self._others(dropped)
            return
        self._again.append(number)
        # Later: here it would be dropped once more.
        signal.signal(signal.SIGALRM, self._raise)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    def _raise(self, alarm: int, frame: FrameType | None) -> None:
        if not self._again:  # the alarm of somebody else
            return
        number = self._again.pop(0)
        if self._again:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        signal.raise_signal(number)  # by now its handler may be that of ``deferred``, or the default one


def _signal_of(error: BaseException | None) -> int | None:
    """Return the signal whose handler has raised ``error``, if one has."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return error.number if isinstance(error, _Terminated) else None


@contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGINT, SIGTERM, SIGHUP and SIGQUIT to the end of the block; inside of such a block, to the end of that.

    Does nothing outside of the main thread.

    Handlers are replaced instead of signals blocked: a blocked signal is delivered to another thread of the process,
    and Python then runs its handler in the main thread nevertheless.
    """
    global _deferring
    if threading.current_thread() is not threading.main_thread() or _deferring:
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
        _deferring = True
        yield
    finally:
        _deferring = False
        undo.close()
        for received in seen:
            signal.raise_signal(received)


@contextmanager
def importing() -> Iterator[None]:
    """Import modules in the block: signals are deferred, and garbage is not collected.

    Some of what runs in an import prints exceptions and goes on, or raises others. And what an import makes stays: to
    search it for garbage takes a twentieth of the import.
    """
    with deferred():
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()
