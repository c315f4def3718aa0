"""Memory that is allocated while something else is done: what a failure, or an interruption, of either leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.errors import NotEnoughMemory
from kvmpass.layout import MIB, plan_layout
from kvmpass.machine import assignments
from kvmpass.machine.assignments import Assignments
from kvmpass.memory import MachineMemory, MemoryPlan, StopFlag


class Memory:
    """Populates until it is told to stop, or lets ``work`` say how it ends."""

    ordinary_size = ram_size = 1 << 20
    state: object = ()

    def __init__(self, work: Callable[[], None] | None = None) -> None:
        self.work = work
        self.begun, self.ended = threading.Event(), threading.Event()
        self.stopped = False

    def populate(self, stop: StopFlag) -> None:
        self.begun.set()
        try:
            if self.work is not None:
                self.work()
                return
            while not stop.flag[0]:
                threading.Event().wait(0.001)
            self.stopped = True
        finally:
            self.ended.set()


def machine(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(assignments, "check_memory", lambda *arguments, **options: None)
    ram: Any = MachineMemory(MemoryPlan(plan_layout(MIB), ()))
    ram.regions = memory
    lock = threading.RLock()
    return SimpleNamespace(memory=memory, _ram=ram, _device_lock=lock, _check_usable=lambda: None, _sysfs=None)


def test_it_runs_beside_the_block_and_is_complete_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    made = machine(memory := Memory(lambda: go.wait(10) and None), monkeypatch)
    with Assignments.populating(made):
        assert memory.begun.wait(10)
        assert not memory.ended.is_set()
        go.set()
    assert memory.ended.is_set() and made._ram.populated
    memory.begun.clear()
    with Assignments.populating(made):
        pass
    assert not memory.begun.is_set(), "it is populated"


def test_what_is_added_concurrently_is_checked_and_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rounds = machine(memory := Memory(lambda: rounds.append(None)), monkeypatch), list[None]()
    seen: list[int] = []
    monkeypatch.setattr(assignments, "check_memory", lambda sysfs, size, **_: seen.append(size))
    made._ram.begin()
    assert memory.ended.wait(10)
    memory.ordinary_size, memory.state = 5 << 20, object()
    with Assignments.populating(made):
        pass
    assert (seen, len(rounds)) == ([4 << 20], 2)
    assert made._ram.populated


def test_memory_that_is_short_is_said_before_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotEnoughMemory("too little")

    made = machine(memory := Memory(lambda: None), monkeypatch)
    monkeypatch.setattr(assignments, "check_memory", refuse)
    with pytest.raises(NotEnoughMemory), Assignments.populating(made):
        raise AssertionError
    assert not memory.begun.is_set()


def test_what_has_begun_before_is_checked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then it has taken the memory that a check would look for."""
    made = machine(memory := Memory(lambda: None), monkeypatch)
    made._ram.begin()
    assert memory.begun.wait(10)
    monkeypatch.setattr(assignments, "check_memory", None)
    with Assignments.populating(made):
        memory.begun.clear()
    assert made._ram.populated and not memory.begun.is_set()


def test_a_failure_of_the_block_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(memory := Memory(), monkeypatch)
    with pytest.raises(ValueError, match="no kernel"), Assignments.populating(made):
        raise ValueError("no kernel")
    assert memory.ended.is_set() and memory.stopped
    assert not made._ram.populated


def test_its_own_failure_is_raised_behind_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no memory")

    made, after = machine(Memory(fail), monkeypatch), False
    with pytest.raises(OSError, match="no memory"), Assignments.populating(made):
        after = True
    assert after and not made._ram.populated


def test_an_interruption_of_the_wait_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(memory := Memory(), monkeypatch)
    join, calls = threading.Thread.join, []

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        calls.append(self.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), Assignments.populating(made):
        pass
    assert memory.stopped and memory.ended.is_set()
    assert calls == ["populate", "populate"]
