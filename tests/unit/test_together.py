"""Calls at the same time: all end before one is answered for, whatever fails and whatever signal arrives."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from kvmpass._together import run_together
from kvmpass.errors import HostNotReady


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
    first, third = OSError("first"), HostNotReady("third", "load its module")
    first.add_note("run as root")
    third.add_note("run as root")
    with pytest.raises(OSError, match="first") as caught:
        run_together(
            ended.set,
            failing(first, lambda: ended.wait(10)),
            failing(KeyboardInterrupt("second")),
            failing(third),
        )
    assert caught.value is first
    assert first.__notes__ == [
        "run as root",
        "and at the same time: KeyboardInterrupt: second",
        "and at the same time: HostNotReady: third",
        "load its module",
    ]
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


class _TimeLimit(Exception):
    """What a handler of SIGALRM raises."""


@pytest.fixture
def time_limit() -> Iterator[None]:
    def handler(*_: object) -> None:
        raise _TimeLimit

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("time_limit")
def test_what_another_handler_raises_waits_for_every_call() -> None:
    ended, failed, twice, count = [], threading.Event(), threading.Event(), itertools.count(1)

    def handler(*_: object) -> None:
        if next(count) == 2:
            signal.setitimer(signal.ITIMER_REAL, 0)
            twice.set()
        raise _TimeLimit

    def slow(number: int) -> None:
        if number == 0:
            failed.wait(10)
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        twice.wait(10)
        ended.append(number)

    signal.signal(signal.SIGALRM, handler)  # the fixture restores the former one
    with pytest.raises(_TimeLimit) as caught:
        run_together(partial(slow, 0), partial(slow, 1), failing(OSError("third"), failed.set))
    assert sorted(ended) == [0, 1]
    assert "OSError: third" in caught.value.__notes__[-1]


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("begun", [True, False])
def test_each_call_is_made_once_even_if_its_thread_is_interrupted_at_the_start(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = threading.Thread.start, iter([True])

    def start(thread: threading.Thread) -> None:
        interrupted = next(left, False)
        if begun or not interrupted:
            original(thread)
        if interrupted:
            signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []

    def slow(number: int) -> None:
        time.sleep(0.1)
        done.append(number)

    with pytest.raises(_TimeLimit):
        run_together(*(partial(slow, number) for number in range(3)))
    assert sorted(done) == [0, 1, 2]


def test_without_memory_for_a_thread_every_call_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    original, left = threading.Thread.start, iter([False, True])

    def start(thread: threading.Thread) -> None:
        if next(left, False):
            raise MemoryError
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []

    def slow(number: int) -> None:
        time.sleep(0.1)
        done.append(number)

    run_together(*(partial(slow, number) for number in range(4)))
    assert sorted(done) == [0, 1, 2, 3]
