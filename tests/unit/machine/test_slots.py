"""A slot that the guest has emptied, and that another device gets before the machine has removed the first one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.machine.remotes import Remote, Remotes
from kvmpass.machine.slots import Slots
from kvmpass.pci import PciBus
from kvmpass.pci.bus import HostBridge


class Hotplug:
    """The controller that the guest reads."""

    def __init__(self) -> None:
        self.up: set[int] = set()
        self.down: set[int] = set()

    def announce(self, slot: int) -> None:
        self.up.add(slot)

    def request_eject(self, slot: int) -> None:
        self.down.add(slot)

    def forget(self, slot: int) -> None:
        self.up.discard(slot)
        self.down.discard(slot)


class Function(HostBridge):
    def quiesce(self) -> None:
        pass


class Stub(Remotes):
    """A machine without KVM, whose guest runs."""

    _running = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(1)
        self.pci, self.hotplug = PciBus(), Hotplug()
        self.jobs: list[Callable[[], None]] = []
        monitor: Any = SimpleNamespace(defer=self.jobs.append, emit_later=lambda event: None)
        board: Any = SimpleNamespace(pci=self.pci, hotplug=self.hotplug, plug=self.plug)
        self._monitor = monitor
        self._slots = Slots(board, [], self._bus_lock, lambda: True)

    def plug(self, make: Callable[[Any], Any], slot: int) -> None:
        self.pci.plug(make(None), slot)

    def add(self, name: str) -> Remote:
        front: Any = SimpleNamespace(name=name, ended="", close=lambda: None)
        remote = Remote(front, lambda front: None, lambda: None)  # type: ignore[arg-type, return-value]

        def make(wiring: Any) -> Any:
            remote.function = Function()  # type: ignore[assignment]
            return remote.function

        remote.slot = self._slots.add(make, range(30, 0, -1))
        self._remotes.append(remote)
        return remote


@pytest.fixture
def machine() -> Stub:
    return Stub()


def test_the_removal_of_an_ejected_device_spares_the_next_one_in_its_slot(machine: Stub) -> None:
    first = machine.add("first")
    machine.hotplug.up.clear()
    machine._on_eject_remote(first.slot)
    second = machine.add("second")
    assert second.slot == first.slot
    machine.jobs.pop()()
    assert machine._remotes == [second]
    assert second.function in machine.pci.functions
    assert machine.hotplug.up == {second.slot}, "the guest has yet to see it"
    assert list(machine._slots._made) == [second.slot], "a reset constructs it again"


def test_a_device_that_is_ejected_already_is_not_requested_again(machine: Stub) -> None:
    first = machine.add("first")
    machine._on_eject_remote(first.slot)
    second = machine.add("second")
    machine.remove_remote(first, timeout=0.0)
    assert machine.hotplug.down == set(), "it would be the second that the guest ejects"
    device, other = (SimpleNamespace(slot=second.slot, ejected=threading.Event()) for _ in range(2))
    devices: list[Any] = [device, other]
    machine._slots.devices = devices
    device.ejected.set()
    assert machine._slots.eject(devices[0], 0.0) == [device]
    machine._slots.request_eject(devices[0])
    assert machine.hotplug.down == set()
    device.ejected.clear()
    machine._slots.request_eject(devices[0])
    assert machine.hotplug.down == {second.slot}
