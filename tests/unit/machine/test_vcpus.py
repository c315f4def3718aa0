"""The run loop over fake vCPUs: how it ends, pauses and resumes."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from kvmpass.bus import Bus
from kvmpass.kvm import Fastpath, FastRegisters, Vcpu
from kvmpass.kvm.exits import DeliveryExit, Exit, InterruptedExit, MmioExit, PortExit, RefusedExit, ShutdownExit
from kvmpass.layout import Range
from kvmpass.machine.vcpus import GuestOutcome, VcpuThreads


class FakeVcpu:
    """Runs until an exit is requested; ``exits`` are the results of its next entries."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.exits: list[Exit] = []
        self.coalesced: list[tuple[bool, int, bytes]] = []
        self.entries = 0
        self.answered = 0
        self._exit_requested = threading.Event()

    def request_exit(self, wanted: bool = True) -> None:
        if wanted:
            self._exit_requested.set()
        else:
            self._exit_requested.clear()

    def run(self) -> Exit:
        self.entries += 1
        deadline = time.monotonic() + 20
        while not self._exit_requested.is_set():
            if self.exits:
                return self.exits.pop(0)
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return InterruptedExit()

    def complete(self, exit_: Exit, data: bytes) -> None: ...

    def coalesced_writes(self) -> Iterator[tuple[bool, int, bytes]]:
        while self.coalesced:
            yield self.coalesced.pop(0)


class Stage:
    def __init__(self, count: int = 2) -> None:
        self.vcpus = [FakeVcpu(index) for index in range(count)]
        self.waiting = threading.Event()
        self.waiting.set()
        self.threads = VcpuThreads(
            cast(list[Vcpu], self.vcpus), Bus("port"), Bus("memory"), threading.RLock(), self.throttle
        )
        self.threads.start()

    def throttle(self) -> None:
        assert self.waiting.wait(20)


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.waiting.set()
    stage.threads.stop()
    assert not any(thread.name.startswith("vcpu") for thread in threading.enumerate())


PORT = PortExit(0x80, 1, 1, True, b"x", 0)


def settle(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_first_outcome_wins_and_all_vcpus_leave(stage: Stage) -> None:
    stage.threads.end(GuestOutcome.DEVICE_ERROR)
    stage.threads.end(GuestOutcome.POWEROFF)
    assert stage.threads.wait(5) is GuestOutcome.DEVICE_ERROR
    settle(lambda: not any(thread.name.startswith("vcpu") for thread in threading.enumerate()))


@pytest.mark.parametrize(
    ("exit_", "outcome", "fault"),
    [
        (ShutdownExit(), GuestOutcome.TRIPLE_FAULT, ""),
        (RefusedExit(errno.EFAULT), GuestOutcome.FAULT, "vCPU 0: KVM_RUN: Bad address: the guest's access"),
        (RefusedExit(errno.EIO), GuestOutcome.FAULT, "vCPU 0: KVM_RUN: Input/output error: KVM has ended this VM"),
        (RefusedExit(errno.ENOMEM), GuestOutcome.FAULT, "vCPU 0: KVM_RUN: Cannot allocate memory"),
    ],
)
def test_a_failed_kvm_run_is_an_outcome_and_no_exception(
    stage: Stage, exit_: Exit, outcome: GuestOutcome, fault: str
) -> None:
    stage.vcpus[0].exits.append(exit_)
    assert stage.threads.wait(5) is outcome
    assert stage.threads.fault.startswith(fault) and bool(stage.threads.fault) == bool(fault)


def test_an_access_during_the_delivery_of_an_event_is_repeated_once(stage: Stage) -> None:
    vcpu = stage.vcpus[0]
    vcpu.exits += [DeliveryExit(0xE0010100), PORT, DeliveryExit(0xE0010100), PORT]
    settle(lambda: stage.threads.reasons.get("Port") == 2)
    assert not stage.threads.ended
    vcpu.exits += [DeliveryExit(0xE0010100), DeliveryExit(0xE0010100)]
    assert stage.threads.wait(5) is GuestOutcome.FAULT
    assert stage.threads.fault == "vCPU 0: an access to 0xe0010100 while an event was delivered"


def test_reads_on_the_fast_path_count_as_exits(stage: Stage) -> None:
    """An access that is repeated after one of them is another one."""
    vcpu = stage.vcpus[0]
    vcpu.exits += [MmioExit(0x1000, 4, False, b"", 0)]
    settle(lambda: stage.threads.reasons.get("Mmio") == 1)
    vcpu.answered = 7
    assert stage.threads.reasons["Mmio"] == 8
    vcpu.exits.append(DeliveryExit(0xE0010100))
    settle(lambda: stage.threads.reasons.get("Delivery") == 1)
    vcpu.answered += 1
    vcpu.exits.append(DeliveryExit(0xE0010100))
    settle(lambda: stage.threads.reasons.get("Delivery") == 2)
    assert not stage.threads.ended


def test_a_pause_stops_all_vcpus_until_resume(stage: Stage) -> None:
    settle(lambda: all(vcpu.entries for vcpu in stage.vcpus))
    assert stage.threads.pause(5)
    assert stage.threads._paused
    entries = [vcpu.entries for vcpu in stage.vcpus]
    stage.vcpus[0].exits.append(PORT)
    time.sleep(0.05)
    assert [vcpu.entries for vcpu in stage.vcpus] == entries
    assert stage.threads.pause(5), "idempotent"
    stage.threads.resume()
    stage.threads.resume()
    settle(lambda: not stage.vcpus[0].exits)
    settle(lambda: stage.threads.reasons.get("Port") == 1)
    settle(lambda: stage.threads.reasons["Interrupted"] >= 2)  # a thread counts once it goes on
    assert not stage.threads._paused


def test_a_pause_before_the_threads_start() -> None:
    """A thread that starts later does not enter the guest either."""
    stage = Stage.__new__(Stage)
    stage.vcpus = [FakeVcpu(0)]
    stage.vcpus[0].exits = [PORT] * 1000
    stage.waiting = threading.Event()
    stage.waiting.set()
    stage.threads = VcpuThreads(
        cast(list[Vcpu], stage.vcpus), Bus("port"), Bus("memory"), threading.RLock(), stage.throttle
    )
    assert stage.threads.pause(5)
    stage.threads.start()
    settle(lambda: stage.threads._parked == 1)
    assert stage.threads.reasons == {}
    stage.threads.resume()
    settle(lambda: stage.threads.reasons.get("Port") == 1000)
    stage.threads.stop()


def test_writes_that_kvm_has_collected_come_before_the_exit() -> None:
    written: list[tuple[int, bytes]] = []

    class Device:
        def read(self, offset: int, size: int) -> bytes:
            written.append((offset, b"read"))
            return bytes(size)

        def write(self, offset: int, data: bytes) -> None:
            written.append((offset, data))

    bus = Bus("port")
    bus.add(0x70, 0x20, Device())
    vcpu = FakeVcpu(0)
    vcpu.coalesced = [(True, 0x70, b"a"), (True, 0x71, b"bc")]
    vcpu.exits = [PortExit(0x80, 1, 1, False, b"", 0)]
    threads = VcpuThreads(cast(list[Vcpu], [vcpu]), bus, Bus("memory"), threading.RLock(), lambda: None)
    assert threads.accesses == {}
    threads.start()
    settle(lambda: threads.reasons.get("Port") == 1 and not vcpu.exits)
    threads.stop()
    assert written == [(0, b"a"), (1, b"bc"), (0x10, b"read")]
    assert threads.accesses == {}, "nobody asked for them"


def test_exits_are_counted_by_what_is_accessed() -> None:
    class Device:
        def read(self, offset: int, size: int) -> bytes:
            return bytes(size)

        def write(self, offset: int, data: bytes) -> None:
            pass

    ports, mmio = Bus("port"), Bus("memory")
    ports.add(0x70, 0x20, Device(), "clock")
    mmio.add(0x1000, 0x2000, Device(), lambda offset: f"page {offset >> 12}")
    vcpu = FakeVcpu(0)
    vcpu.coalesced = [(True, 0x70, b"a"), (False, 0x1000, b"a")]  # no exits
    accesses: list[PortExit | MmioExit] = [
        PortExit(0x70, 1, 4, False, b"", 0),
        PortExit(0x71, 1, 1, True, b"1", 0),
        PortExit(0x90, 1, 1, True, b"1", 0),
        MmioExit(0x1008, 4, False, b"", 0),
        MmioExit(0x2008, 4, True, bytes(4), 0),
        MmioExit(0x2FFC, 4, True, bytes(4), 0),
        MmioExit(0x3000, 4, False, b"", 0),
    ]
    vcpu.exits = [*accesses]
    fastpath = Fastpath()
    fastpath.set(0x4000, FastRegisters(bytearray(8), bytearray(b"\xff" * 8), -1, 0, Range(0, 0)), "page 1")
    assert [fastpath.read(0x4000, 4), fastpath.read(0x4004, 2)] == [bytes(4), bytes(2)]
    threads = VcpuThreads(cast(list[Vcpu], [vcpu]), ports, mmio, threading.RLock(), lambda: None, True, fastpath)
    threads.start()
    settle(lambda: not vcpu.exits and sum(map(sum, threads.accesses.values())) == len(accesses) + 2)
    threads.stop()
    assert threads.accesses == {
        "clock": (1, 1),
        "port without a device": (0, 1),
        "page 0": (1, 0),
        "page 1": (2, 2),
        "memory without a device": (1, 0),
    }
    assert next(iter(threads.accesses)) == "page 1", "most first"


def test_an_end_during_a_pause(stage: Stage) -> None:
    assert stage.threads.pause(5)
    stage.threads.end(GuestOutcome.STOPPED)
    assert stage.threads.wait(5) is GuestOutcome.STOPPED
    assert stage.threads.pause(5), "no vCPU is left to stop"


def test_a_throttled_vcpu_cannot_be_paused_and_the_others_resume(stage: Stage) -> None:
    stage.waiting.clear()
    stage.vcpus[1].exits.append(PORT)
    settle(lambda: not stage.vcpus[1].exits)
    assert not stage.threads.pause(0.05)
    assert not stage.threads._paused
    stage.vcpus[0].exits.append(PORT)
    settle(lambda: stage.threads.reasons.get("Port") == 2)
    stage.waiting.set()
    assert stage.threads.pause(5)
