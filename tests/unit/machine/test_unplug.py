"""Asking a guest to eject a device: it does, it does not, or it ends."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.errors import GuestError
from kvmpass.machine import Machine
from kvmpass.machine.slots import Slots


class Hotplug:
    """The controller that the guest reads."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def request_eject(self, slot: int) -> None:
        self.calls.append(("request", slot))

    def withdraw(self, slot: int) -> None:
        self.calls.append(("withdraw", slot))


class Stub(Machine):
    """A machine without KVM: two functions in slot 1, another device in slot 2."""

    alive = True

    def __init__(self) -> None:
        self.hotplug = Hotplug()
        board: Any = SimpleNamespace(hotplug=self.hotplug)
        places = (("0000:01:00.0", 1), ("0000:01:00.1", 1), ("0000:02:00.0", 2))
        self.devices: list[Any] = [
            SimpleNamespace(bdf=bdf, slot=slot, ejected=threading.Event()) for bdf, slot in places
        ]
        self.released: list[str] = []
        self._slots = Slots(board, self.devices, threading.RLock(), lambda: self.alive)

    @property
    def _running(self) -> bool:
        return self.alive

    def _has(self, device: Any) -> bool:
        return device in self.devices

    def deassign(self, device: Any) -> None:
        self.released.append(device.bdf)


@pytest.fixture
def machine() -> Stub:
    return Stub()


def later(seconds: float, action: Any) -> None:
    threading.Timer(seconds, action).start()


def test_an_eject_releases_the_whole_slot(machine: Stub) -> None:
    later(0.05, machine.devices[0].ejected.set)
    started = time.monotonic()
    machine.unplug(machine.devices[0], 30)
    assert time.monotonic() - started < 10
    assert machine.released == ["0000:01:00.0", "0000:01:00.1"]
    assert machine.hotplug.calls == [("request", 1)]


def test_a_guest_that_does_not_eject_keeps_the_device(machine: Stub) -> None:
    """It fails when the time is up, not much later, and the request is withdrawn."""
    started = time.monotonic()
    with pytest.raises(GuestError, match=r"did not eject 0000:02:00\.0 within 0\.2 seconds") as failed:
        machine.unplug(machine.devices[2], 0.2)
    assert 0.2 <= time.monotonic() - started < 5
    assert "deassign" in failed.value.__notes__[0]
    assert machine.released == []
    assert machine.hotplug.calls == [("request", 2), ("withdraw", 2)]


def test_an_eject_at_the_last_moment_counts(machine: Stub) -> None:
    """The guest ejects once the time is up, before the request is withdrawn."""
    device = machine.devices[2]

    class AtLast(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            before = super().wait(timeout)
            self.set()
            return before

    device.ejected = AtLast()
    machine.unplug(device, 0)
    assert machine.released == ["0000:02:00.0"]
    assert machine.hotplug.calls == [("request", 2)]


def test_a_timeout_of_zero_does_not_wait(machine: Stub) -> None:
    with pytest.raises(GuestError):
        machine.unplug(machine.devices[2], 0)
    machine.devices[2].ejected.set()
    machine.unplug(machine.devices[2], 0)
    assert machine.released == ["0000:02:00.0"]


def test_the_guests_end_ends_the_wait(machine: Stub) -> None:
    later(0.05, lambda: setattr(machine, "alive", False))
    machine.unplug(machine.devices[2], 60)
    assert machine.released == ["0000:02:00.0"]
    assert ("withdraw", 2) not in machine.hotplug.calls


def test_without_a_running_guest_nothing_is_requested(machine: Stub) -> None:
    machine.alive = False
    machine.unplug(machine.devices[0])
    assert (machine.released, machine.hotplug.calls) == (["0000:01:00.0"], [])


def test_a_removed_device_is_ignored(machine: Stub) -> None:
    [*_, gone] = machine.devices
    machine.devices.remove(gone)
    machine.unplug(gone, 0)
    assert (machine.released, machine.hotplug.calls) == ([], [])
