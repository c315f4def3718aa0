"""A machine's memory before the machine: the regions of its plan, and the thread that populates them."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmpass.errors import Closed, HostNotReady, LayoutError
from kvmpass.layout import GIB, MIB, Range, plan_layout
from kvmpass.machine import Machine
from kvmpass.memory import (
    Backing,
    GuestMemory,
    HostMapping,
    MachineMemory,
    MemoryPlan,
    PlannedRegion,
    RegionKind,
    StopFlag,
)

PLAN = MemoryPlan(
    plan_layout(2 * MIB),
    tuple(PlannedRegion(RegionKind.RAM, Range(at, MIB), f"ram{at}", Backing.ANONYMOUS) for at in (0, GIB)),
)


@pytest.fixture
def memory() -> Iterator[MachineMemory]:
    memory = MachineMemory(PLAN)
    yield memory
    memory.close()


def populating(monkeypatch: pytest.MonkeyPatch, work: Callable[[StopFlag], None]) -> list[threading.Thread]:
    """Let ``work`` populate; return the threads that have called it."""
    threads: list[threading.Thread] = []

    def populate(self: GuestMemory, stop: StopFlag) -> None:
        threads.append(threading.current_thread())
        work(stop)

    monkeypatch.setattr(GuestMemory, "populate", populate)
    return threads


def until_stopped(stop: StopFlag) -> None:
    while not stop.flag[0]:
        threading.Event().wait(0.001)


def test_its_regions_are_those_of_the_plan(memory: MachineMemory) -> None:
    assert [(region.range, region.name) for region in memory.regions] == [
        (part.range, part.name) for part in PLAN.regions
    ]
    memory.begin()
    assert memory.begun
    memory.wait()
    assert memory.populated and not memory.begun
    memory.close()
    memory.close()
    assert len(memory.regions) == 0


def test_a_plan_that_fails_leaves_nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    add = GuestMemory.add_ram

    def second_fails(self: GuestMemory, *arguments: Any, **options: Any) -> Any:
        if made:
            raise OSError(errno.ENOMEM, "no more")
        made.append(add(self, *arguments, **options))
        return made[0]

    monkeypatch.setattr(GuestMemory, "add_ram", second_fails)
    with pytest.raises(OSError, match="no more"):
        MachineMemory(PLAN)
    with pytest.raises(Closed):
        made[0].hva  # noqa: B018
    monkeypatch.undo()
    with pytest.raises(LayoutError):
        MachineMemory(MemoryPlan(PLAN.layout, (PLAN.regions[0], PLAN.regions[0])))


def test_nodes_are_preferred_before_there_are_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, object]] = []
    monkeypatch.setattr(HostMapping, "prefer_nodes", lambda self, nodes: seen.append((self.address, nodes)))
    memory = MachineMemory(PLAN, (1,))
    assert seen == [(region.hva, (1,)) for region in memory.regions]
    assert memory.nodes_refused is None
    memory.close()
    MachineMemory(PLAN).close()
    assert len(seen) == 2


def test_a_kernel_that_refuses_the_nodes_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of a container may forbid mbind: memory is slower then, and as good."""
    calls: list[object] = []

    def refuse(self: HostMapping, nodes: object) -> None:
        calls.append(nodes)
        raise PermissionError(errno.EPERM, "mbind")

    monkeypatch.setattr(HostMapping, "prefer_nodes", refuse)
    memory = MachineMemory(PLAN, (1,))
    assert len(calls) == 1 and isinstance(memory.nodes_refused, PermissionError)
    memory.wait()
    memory.close()


def test_it_is_populated_once(memory: MachineMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = populating(monkeypatch, lambda stop: None)
    for _ in range(2):
        memory.begin()
    for _ in range(2):
        memory.wait()
    assert len(threads) == 1


def test_to_wait_begins_it(memory: MachineMemory) -> None:
    memory.wait()
    assert memory.populated


def test_closing_ends_the_thread_before_anything_is_unmapped(
    memory: MachineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[int] = []

    def work(stop: StopFlag) -> None:
        until_stopped(stop)
        mapped.extend(region.hva for region in memory.regions)  # raises once they are closed

    threads = populating(monkeypatch, work)
    memory.begin()
    memory.close()
    assert len(mapped) == 2 and not threads[0].is_alive() and not memory.populated


def test_after_a_stop_it_can_begin_again(memory: MachineMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = populating(monkeypatch, until_stopped)
    memory.begin()
    memory.stop()
    memory.stop()
    assert not threads[0].is_alive() and not memory.begun
    monkeypatch.undo()
    memory.wait()
    assert memory.populated


def test_its_failure_is_raised_where_it_is_waited_for(memory: MachineMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stop: StopFlag) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    populating(monkeypatch, fail)
    memory.begin()
    with pytest.raises(OSError, match="no memory"):
        memory.wait()
    assert not memory.populated and not memory.begun


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("close", [False, True])
def test_a_signal_while_it_is_stopped(memory: MachineMemory, monkeypatch: pytest.MonkeyPatch, close: bool) -> None:
    """It is raised once the thread has ended, and what is to be unmapped is."""

    def interrupting(stop: StopFlag) -> None:
        signal.raise_signal(signal.SIGINT)
        StopFlag.set(stop)

    threads = populating(monkeypatch, until_stopped)
    memory.begin()
    flag = memory._stop
    monkeypatch.setattr(flag, "set", lambda: interrupting(flag))
    with pytest.raises(KeyboardInterrupt):
        memory.close() if close else memory.stop()
    assert not threads[0].is_alive() and not memory.begun
    assert len(memory.regions) == (0 if close else 2)


def test_no_thread_for_it(memory: MachineMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(HostNotReady, match="memory cannot be populated: can't start new thread") as refused:
        memory.begin()
    assert "TasksMax=" in refused.value.__notes__[0]
    assert not memory.begun


def test_a_region_that_is_added_concurrently_is_populated(
    memory: MachineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    populate = GuestMemory.populate

    def counting(self: GuestMemory, stop: StopFlag) -> None:
        seen.append(len(self))
        populate(self, stop)

    monkeypatch.setattr(GuestMemory, "populate", counting)
    memory.begin()
    memory.regions.add_ram(2 * GIB, MIB)
    memory.wait()
    assert memory.populated and seen[-1] == 3


def test_one_owner(memory: MachineMemory) -> None:
    memory.claim()
    with pytest.raises(ValueError, match="another machine's"):
        memory.claim()
    memory.close()
    with pytest.raises(Closed):
        memory.claim()


def test_a_machine_that_cannot_be_made_closes_the_memory(
    memory: MachineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of that machine listens to it any more, as it is of no use to another."""

    def refuse() -> None:
        raise OSError(errno.ENOENT, "no KVM")

    monkeypatch.setattr("kvmpass.machine.machine.System", refuse)
    with pytest.raises(OSError, match="no KVM"):
        Machine(memory)
    assert len(memory.regions) == 0
    with pytest.raises(Closed):
        Machine(memory)
    other = MachineMemory(PLAN)
    other.claim()
    with pytest.raises(ValueError, match="another machine's"):
        Machine(other)
    assert len(other.regions) == 2, "it is still the other machine's"
    other.close()
