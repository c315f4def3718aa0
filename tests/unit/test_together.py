"""Calls at the same time: all end before one is answered for, whatever fails and whatever signal arrives."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from kvmpass._together import run_together


def test_the_calls_run_at_the_same_time_and_the_results_are_in_order() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def call(number: int) -> tuple[int, str]:
        barrier.wait()
        return number, threading.current_thread().name

    results = run_together(*(lambda number=number: call(number) for number in range(3)))  # type: ignore[misc]
    assert [number for number, _ in results] == [0, 1, 2]
    assert [name == threading.current_thread().name for _, name in results] == [False, False, True]
    assert run_together() == []


def test_one_call_needs_no_thread() -> None:
    assert run_together(threading.current_thread) == [threading.current_thread()]


def failing(error: BaseException, meanwhile: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def call() -> None:
        meanwhile()
        raise error

    return call


def test_the_first_failure_is_raised_when_every_call_has_ended() -> None:
    ended = threading.Event()
    first = OSError("first")
    with pytest.raises(OSError, match="first") as caught:
        run_together(
            ended.set,
            failing(first, lambda: ended.wait(10)),
            failing(KeyboardInterrupt("second")),
        )
    assert caught.value is first
    assert first.__notes__ == ["and afterwards: KeyboardInterrupt: second"]
    assert ended.is_set()


@pytest.mark.usefixtures("usual_signals")
def test_a_signal_waits_for_every_call() -> None:
    interrupted, ended = threading.Event(), threading.Event()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.set()

    def slow() -> None:
        interrupted.wait(10)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_together(slow, interrupt)
    assert ended.is_set()


def test_without_threads_the_calls_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original, left = threading.Thread.start, iter([True])

    def start(thread: threading.Thread) -> None:
        if not next(left, False):
            raise RuntimeError("can't start new thread")
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    assert run_together(*(lambda number=number: done.append(number) for number in range(4))) == [None] * 4  # type: ignore[misc]
    assert sorted(done) == [0, 1, 2, 3]
