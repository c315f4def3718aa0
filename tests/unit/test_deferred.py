"""Signals that are deferred: until the end of the outermost block, which alone replaces handlers."""

from __future__ import annotations

import gc
import inspect
import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from kvmpass._signals import deferred, importing


@pytest.fixture(autouse=True)
def usual(usual_signals: None) -> None:
    """With handlers of Python's own."""


def test_a_signal_waits_for_the_outermost_block() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred():
        with deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_block_defers_again_after_an_error() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="inner"), deferred(), deferred():
            raise ValueError("inner")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        reached = []
        with pytest.raises(KeyboardInterrupt), deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("end")
        assert reached


def test_only_the_outermost_block_replaces_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assignment has tens of blocks, most of them within others."""
    calls = []
    replace = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append(number) or replace(number, handler))
    with deferred():
        before = len(calls)
        with deferred():
            pass
        assert len(calls) == before > 0


def test_another_thread_defers_nothing() -> None:
    ran = []

    def work() -> None:
        with deferred():
            ran.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.default_int_handler]


def test_garbage_is_collected_again_after_a_signal_at_any_line_of_importing() -> None:
    function = inspect.unwrap(importing)
    lines, first = inspect.getsourcelines(function)
    interrupted = set()
    for line in range(first, first + len(lines)):

        def trace(frame: FrameType, event: str, argument: object, line: int = line) -> Any:
            if frame.f_code is not function.__code__:
                return None
            if event == "line" and frame.f_lineno == line and line not in interrupted:
                interrupted.add(line)
                signal.raise_signal(signal.SIGINT)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with importing():
                assert not gc.isenabled()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert gc.isenabled(), line
    assert len(interrupted) > 4
