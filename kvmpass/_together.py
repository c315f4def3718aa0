"""Calls that wait in the kernel, made at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from kvmpass._signals import deferred

T = TypeVar("T")

_AGAIN_SECONDS = 0.01


def run_together(*calls: Callable[[], T]) -> list[T]:
    """Make all calls at the same time, each but the last in a thread of its own; return their results in order.

    It returns, or raises, only once every call has ended: signals are deferred until then, and so is what a handler
    of another signal raises outside of a call. Raises that, or else the first failure in the order of ``calls``; the
    other failures, and their notes, become its notes. Calls for which there is no thread are made one by one.
    """
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}
    makers: dict[int, int] = {}  # the thread that makes each call
    arrived: list[BaseException] = []

    def ended(number: int) -> bool:
        return number in results or number in failures

    def make(number: int) -> None:
        this = threading.get_ident()
        if makers.setdefault(number, this) != this or ended(number):
            return
        try:
            results[number] = calls[number]()
        except BaseException as error:
            failures[number] = error

    with deferred():
        numbers = [*range(len(calls))]  # without a thread, as far as this one knows: ``start`` may be interrupted
        threads: list[threading.Thread] = []
        while not all(map(ended, range(len(calls)))):
            try:
                with suppress(RuntimeError, MemoryError):  # the limit of threads
                    while len(numbers) > 1:
                        threads.append(threading.Thread(target=make, args=[numbers[0]], name="together", daemon=True))
                        threads[-1].start()
                        del numbers[0]
                while numbers:
                    make(numbers[0])
                    del numbers[0]
                for thread in threads:
                    if thread.is_alive():
                        thread.join()
                if not arrived:
                    break
                time.sleep(_AGAIN_SECONDS)  # a thread whose ``join`` was interrupted counts as stopped (bpo-45274)
            except BaseException as error:
                if not arrived:  # the first is enough, of a timer that repeats
                    arrived.append(error)
    arrived += [failures[number] for number in sorted(failures)]
    if arrived:
        raise _with_notes_of(*arrived)
    return [results[number] for number in range(len(calls))]


def _with_notes_of(first: BaseException, *others: BaseException) -> BaseException:
    notes = set(getattr(first, "__notes__", ()))
    for error in others:
        own = [note for note in getattr(error, "__notes__", ()) if note not in notes]
        first.add_note(f"and at the same time: {type(error).__name__}: {error}")
        first.__notes__ += own  # what to do about it
        notes.update(own)
    return first
