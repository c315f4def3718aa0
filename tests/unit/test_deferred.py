"""Signals that are deferred: until the end of the outermost block, which alone replaces handlers."""

from __future__ import annotations

import signal
import threading

import pytest

from kvmpass._signals import deferred


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
