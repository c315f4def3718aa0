"""The event loop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from kvmpass._eventloop import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop("test")
    yield loop
    loop.close()
    assert not any(thread.name == "test" for thread in threading.enumerate())


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_the_thread_starts_with_the_first_use(loop: EventLoop) -> None:
    assert not any(thread.name == "test" for thread in threading.enumerate())


def test_functions_run_in_order_in_the_loops_thread(loop: EventLoop) -> None:
    seen: list[tuple[int, str]] = []
    done = threading.Event()
    for number in range(3):
        loop.call(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
    loop.call(done.set)
    assert done.wait(10)
    assert seen == [(0, "test"), (1, "test"), (2, "test")]


def test_a_callback_that_raises_does_not_end_the_loop(
    loop: EventLoop, eventfd: int, caplog: pytest.LogCaptureFixture
) -> None:
    seen = threading.Semaphore(0)

    def callback() -> None:
        os.eventfd_read(eventfd)
        seen.release()
        raise RuntimeError("of the test")

    loop.add_reader(eventfd, callback)
    for _ in range(2):
        os.eventfd_write(eventfd, 1)
        assert seen.acquire(timeout=10)
    done = threading.Event()
    loop.call(done.set)
    assert done.wait(10)
    assert "of the test" in caplog.text


def test_a_descriptor_is_added_without_waking_the_thread(
    loop: EventLoop, eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, started = threading.Event(), threading.Event()
    loop.call(started.set)
    assert started.wait(10)
    with monkeypatch.context() as patched:
        patched.delattr(os, "eventfd_write")
        loop.add_reader(eventfd, lambda: [os.eventfd_read(eventfd), called.set()])
    os.eventfd_write(eventfd, 1)
    assert called.wait(10)


def test_a_removed_callback_is_not_called(loop: EventLoop, eventfd: int) -> None:
    called = threading.Event()
    loop.add_reader(eventfd, called.set)
    loop.remove_reader(eventfd)
    loop.remove_reader(eventfd)
    os.eventfd_write(eventfd, 1)
    done = threading.Event()
    loop.call(done.set)
    assert done.wait(10)
    assert not called.is_set()


def test_a_descriptor_is_removed_after_close(eventfd: int) -> None:
    loop = EventLoop("own")
    loop.add_reader(eventfd, lambda: None)
    loop.close()
    loop.remove_reader(eventfd)


def test_closing_from_a_descriptors_callback(eventfd: int) -> None:
    """Other ready descriptors are not read after it."""
    loop, done = EventLoop("own"), threading.Event()
    other = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close() -> None:
        loop.close()
        done.set()

    loop.add_reader(eventfd, close)
    os.eventfd_write(eventfd, 1)
    assert done.wait(10)
    time.sleep(0.05)
    assert os.eventfd_read(other) == 1
    os.close(other)


def test_closing_from_a_callback() -> None:
    loop, done = EventLoop("own"), threading.Event()

    def close() -> None:
        loop.close()
        done.set()

    loop.call(close)
    assert done.wait(10)


def test_delayed_functions_run_in_the_order_of_their_times(loop: EventLoop) -> None:
    seen: list[str] = []
    done = threading.Event()
    started = time.monotonic()
    loop.call(done.set, 0.8)
    loop.call(lambda: seen.append("later"), 0.4)
    loop.call(lambda: seen.append("now"), 0.0)
    loop.call(lambda: seen.append("called"))
    assert done.wait(10)
    assert seen[-1] == "later" and set(seen) == {"now", "called", "later"}
    assert time.monotonic() - started >= 0.8


def test_calls_after_close_are_dropped() -> None:
    """Its descriptors may have been reused by then."""
    loop, called = EventLoop("own"), threading.Event()
    loop.call(called.set, 0.5)
    loop.close()
    reused = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    loop.call(called.set)
    loop.call(called.set, 0.0)
    assert not called.wait(0.8)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(reused)
    os.close(reused)


def test_a_descriptor_that_is_closed_before_it_is_removed(loop: EventLoop) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    loop.add_reader(fd, lambda: None)
    os.close(fd)
    loop.remove_reader(fd)
    done = threading.Event()
    loop.call(done.set)
    assert done.wait(10)
