"""Calls that wait in the kernel, made at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from kvmpass._signals import deferred
from kvmpass._teardown import run_all

T = TypeVar("T")


def run_together(*calls: Callable[[], T]) -> list[T]:
    """Make all calls at the same time, each but the last in a thread of its own; return their results in order.

    It returns, or raises, only once every call has ended: signals are deferred until then. Raises the first failure
    in the order of ``calls``; the others become its notes. Calls for which there is no thread are made one by one.
    """
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}

    def make(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            failures[number] = error

    with deferred():
        numbers = [*range(len(calls))]
        threads = []
        with suppress(RuntimeError):  # the limit of threads
            while len(numbers) > 1:
                thread = threading.Thread(target=make, args=[numbers[0]], name="together", daemon=True)
                thread.start()
                threads.append(thread)
                del numbers[0]
        for number in numbers:
            make(number)
        for thread in threads:
            thread.join()
    run_all(*(partial(_raise, failures[number]) for number in sorted(failures)))
    return [results[number] for number in range(len(calls))]


def _raise(error: BaseException) -> None:
    raise error
