"""The thread that waits for descriptors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from kvmpass.machine.watch import Watch


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch("test")
    yield watch
    watch.close()
    assert not any(thread.name == "test" for thread in threading.enumerate())


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_no_thread_before_it_is_used(watch: Watch) -> None:
    assert not any(thread.name == "test" for thread in threading.enumerate())


def test_calls_run_in_order_in_the_watchs_thread(watch: Watch) -> None:
    seen: list[tuple[int, str]] = []
    done = threading.Event()
    for number in range(3):
        watch.call(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
    watch.call(done.set)
    assert done.wait(10)
    assert seen == [(0, "test"), (1, "test"), (2, "test")]


def test_a_callback_that_raises_does_not_end_it(watch: Watch, eventfd: int, caplog: pytest.LogCaptureFixture) -> None:
    seen = threading.Semaphore(0)

    def callback() -> None:
        os.eventfd_read(eventfd)
        seen.release()
        raise RuntimeError("of the test")

    watch.add(eventfd, callback)
    for _ in range(2):
        os.eventfd_write(eventfd, 1)
        assert seen.acquire(timeout=10)
    done = threading.Event()
    watch.call(done.set)
    assert done.wait(10)
    assert "of the test" in caplog.text


def test_what_is_removed_is_not_called(watch: Watch, eventfd: int) -> None:
    called = threading.Event()
    watch.add(eventfd, called.set)
    watch.remove(eventfd)
    watch.remove(eventfd)
    os.eventfd_write(eventfd, 1)
    done = threading.Event()
    watch.call(done.set)
    assert done.wait(10)
    assert not called.is_set()


def test_closing_from_a_descriptors_callback(eventfd: int) -> None:
    """Of what is ready beside it nothing is touched any more."""
    watch, done = Watch("own"), threading.Event()
    other = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close() -> None:
        watch.close()
        done.set()

    watch.add(eventfd, close)
    os.eventfd_write(eventfd, 1)
    assert done.wait(10)
    time.sleep(0.05)
    assert os.eventfd_read(other) == 1
    os.close(other)


def test_closing_from_a_callback() -> None:
    watch, done = Watch("own"), threading.Event()

    def close() -> None:
        watch.close()
        done.set()

    watch.call(close)
    assert done.wait(10)


def test_what_waits_for_its_time_comes_in_the_order_of_times(watch: Watch) -> None:
    seen: list[str] = []
    done = threading.Event()
    started = time.monotonic()
    watch.call_later(0.2, done.set)
    watch.call_later(0.1, lambda: seen.append("later"))
    watch.call_later(0.0, lambda: seen.append("now"))
    watch.call(lambda: seen.append("called"))
    assert done.wait(10)
    assert seen[-1] == "later" and set(seen) == {"now", "called", "later"}
    assert 0.2 <= time.monotonic() - started < 5


def test_what_comes_after_the_end_is_dropped() -> None:
    """Its descriptors may be somebody else's by then."""
    watch, called = Watch("own"), threading.Event()
    watch.call_later(0.5, called.set)
    watch.close()
    reused = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    watch.call(called.set)
    watch.call_later(0.0, called.set)
    assert not called.wait(0.8)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(reused)
    os.close(reused)
