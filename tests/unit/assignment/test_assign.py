"""What a failure of ``assigned`` leaves while memory is being populated, and which of several reasons it names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.host_tree import Host

from kvmpass import host as hosts
from kvmpass import machine as machines
from kvmpass.assignment import assign
from kvmpass.assignment.assign import check_guest
from kvmpass.errors import BadAddress, Closed, DeviceInUse, HostNotReady, NoSuchDevice, NotEnoughMemory
from kvmpass.guest import GuestSpec
from kvmpass.layout import MIB, Range, plan_layout
from kvmpass.memory import (
    Backing,
    GuestMemory,
    MachineMemory,
    MemoryPlan,
    MemoryRegion,
    PlannedRegion,
    RegionKind,
    StopFlag,
)

NVME = "0000:01:00.0"


class Made:
    """The memory that ``assigned`` has made, and the threads that populate it until they are stopped."""

    def __init__(self) -> None:
        self.memories: list[MachineMemory] = []
        self.regions: list[MemoryRegion] = []
        self.threads: list[threading.Thread] = []
        self.begun = threading.Event()

    def make(self, *_: Any) -> MachineMemory:
        part = PlannedRegion(RegionKind.RAM, Range(0, MIB), "ram0", Backing.ANONYMOUS)
        self.memories.append(memory := MachineMemory(MemoryPlan(plan_layout(MIB), (part,))))
        self.regions.extend(memory.regions)
        return memory

    def populate(self, regions: GuestMemory, stop: StopFlag) -> None:
        self.threads.append(threading.current_thread())
        self.begun.set()
        while not stop.flag[0]:
            threading.Event().wait(0.001)

    def check_gone(self) -> None:
        """No thread populates, and nothing is mapped."""
        assert self.threads and not any(thread.is_alive() for thread in self.threads)
        [region] = self.regions
        with pytest.raises(Closed):
            region.hva  # noqa: B018


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    tree = Host(tmp_path)
    tree.add(NVME, "nvme", 1, 0x010802)
    made = Made()
    monkeypatch.setattr(hosts, "Sysfs", lambda: tree)
    monkeypatch.setattr(assign, "check_guest", lambda *_: None)
    monkeypatch.setattr(assign, "make_memory", made.make)
    monkeypatch.setattr(GuestMemory, "populate", lambda self, stop: made.populate(self, stop))
    return made


def run(address: str = NVME) -> None:
    with assign.assigned([address], GuestSpec()):
        raise AssertionError


def failing(error: BaseException, made: Made | None = None) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        if made is not None:
            assert made.begun.wait(10), "it is being populated by now"
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [HostNotReady("no IOMMU"), DeviceInUse("mounted"), KeyboardInterrupt(), SystemExit(143)]
)
def test_a_failure_ends_the_thread_and_frees_the_memory(
    made: Made, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(assign, "check", failing(error, made))
    with pytest.raises(type(error)):
        run()
    made.check_gone()


def test_a_machine_that_cannot_be_made_leaves_no_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "check", lambda *_, **__: None)
    monkeypatch.setattr(machines, "Machine", failing(OSError("no VM"), made))
    with pytest.raises(OSError, match="no VM"):
        run()
    made.check_gone()


class Using:
    """In the place of a machine: it owns its memory, and uses the regions until it is closed."""

    failure: OSError | None = None

    def __init__(self, memory: MachineMemory, **_: Any) -> None:
        self.memory, self.used = memory, True
        memory.regions.listen(self)

    def region_wanted(self, *_: Any) -> None:
        """Take any."""

    region_added = region_removed = region_wanted

    def holds(self, region: MemoryRegion) -> bool:
        return self.used

    def __enter__(self) -> Using:
        return self

    def __exit__(self, *_: object) -> None:
        if self.failure is not None:  # a mapping that the kernel keeps: nothing is unmapped
            self.memory.stop()
            raise self.failure
        self.used = False
        self.memory.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_once_the_machine_is_made(made: Made, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The machine owns the memory then: nobody else unmaps it first, which would be refused by what uses it."""

    def mark(stage: str) -> None:
        if stage == "machine":
            raise error

    monkeypatch.setattr(assign, "check", lambda *_, **__: None)
    monkeypatch.setattr(machines, "Machine", Using)
    with pytest.raises(type(error)) as raised, assign.assigned([NVME], GuestSpec(), mark=mark):
        raise AssertionError
    assert raised.value is error
    made.check_gone()


def test_a_machine_that_cannot_be_closed_says_why(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "check", lambda *_, **__: None)
    monkeypatch.setattr(machines, "Machine", Using)
    monkeypatch.setattr(Using, "failure", OSError("the IOMMU keeps a mapping"))
    monkeypatch.setattr("kvmpass.guest.prepare", failing(OSError("no kernel")))
    with pytest.raises(OSError, match="the IOMMU keeps a mapping"):
        run()
    assert made.regions[0].hva and not made.threads[0].is_alive()


@pytest.mark.parametrize("address, error", [("nonsense", BadAddress), ("0000:7f:00.0", NoSuchDevice)])
def test_a_wrong_address_is_said_before_memory_is_touched(made: Made, address: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(address)
    assert not made.memories


def test_a_device_in_use_is_said_before_memory_that_is_short(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "check_guest", failing(NotEnoughMemory("too little")))
    monkeypatch.setattr(assign, "check", failing(DeviceInUse("mounted")))
    with pytest.raises(DeviceInUse, match="mounted"):
        run()
    monkeypatch.setattr(assign, "check", lambda *_, **__: None)
    with pytest.raises(NotEnoughMemory, match="too little"):
        run()
    assert not made.memories


@pytest.mark.parametrize("page", [0, 2 * MIB])
def test_what_a_guest_needs_besides_its_memory(tmp_path: Path, page: int) -> None:
    """Page tables, copies of kernel and initramfs, and the files to copy, of the host and of a cgroup: in one sum."""
    tree, size, copied = Host(tmp_path), 256 * MIB, 100 * MIB
    tree.put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "128")
    needed = copied + 160 * MIB if page else size + size // 128 + copied + 160 * MIB
    tree.put("proc/self/mountinfo", "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    tree.put("proc/self/cgroup", "0::/part")
    tree.put("sys/fs/cgroup/part/memory.current", "0")
    backing = Backing.HUGETLB_2M if page else Backing.ANONYMOUS

    def check(available: int, limit: int) -> None:
        tree.put("proc/meminfo", f"MemAvailable: {available >> 10} kB")
        tree.put("sys/fs/cgroup/part/memory.max", str(limit))
        check_guest((), hosts.Look(tree), size, backing, 1, copied)

    check(needed, needed)
    for available, limit in ((needed - MIB, needed), (needed, needed - MIB)):
        with pytest.raises(NotEnoughMemory):
            check(available, limit)
