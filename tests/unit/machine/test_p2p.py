"""Resets by the host of devices whose BARs others reach: what decodes nothing meanwhile, and what comes back."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.errors import NotAssignable
from kvmpass.host import Bdf
from kvmpass.machine import Machine
from kvmpass.machine.device import AssignedDevice

FIRST, SECOND, OTHER = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"


class Function:
    """What the guest sees of a device."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.refusing = False

    def suspend(self) -> None:
        if self.refusing:
            raise OSError(errno.EBUSY, "the IOMMU keeps it")
        self.log.append(f"suspend {self.name}")

    def resume(self) -> None:
        self.log.append(f"resume {self.name}")


class Stub(Machine):
    """A machine without KVM: two functions of a bus, and another device. ``log`` has what happens."""

    def __init__(self, *, p2p: bool = True) -> None:
        self.log: list[str] = []
        self._device_lock = threading.RLock()
        self.dependent = [FIRST, SECOND]
        self.failing = False
        self.domain: Any = SimpleNamespace(p2p=p2p, dependent=self.find, hot_reset=self.reset_bus)
        self._monitor: Any = SimpleNamespace(emit=lambda event: None)
        self.devices = [self.device(name) for name in (FIRST, SECOND, OTHER)]

    def device(self, name: str) -> AssignedDevice:
        found: Any = SimpleNamespace(bdf=Bdf.parse(name), group=1, reset_methods=("flr",))
        vfio: Any = SimpleNamespace(name=name, resettable=False, reset=lambda: self.log.append(f"reset {name}"))
        device = AssignedDevice(found, vfio, threading.RLock())
        device.function = Function(name, self.log)  # type: ignore[assignment]
        return device

    def find(self, vfio: Any) -> list[Any]:
        if self.failing:
            raise NotAssignable("others are affected")
        return [SimpleNamespace(name=name) for name in self.dependent]

    def reset_bus(self, vfio: Any) -> None:
        self.log.append("reset the bus")
        if self.log.count("reset the bus") > 1:
            raise OSError(errno.ENODEV, "reset")


def test_a_function_is_suspended_alone() -> None:
    machine = Stub()
    device = machine.devices[0]
    device.vfio.resettable = True
    machine.reset_device(device)
    assert machine.log == [f"suspend {FIRST}", f"reset {FIRST}", f"resume {FIRST}"]


def test_a_bus_with_all_of_its_devices() -> None:
    """They come back also where the reset fails."""
    machine = Stub()
    whole = [f"suspend {FIRST}", f"suspend {SECOND}", "reset the bus", f"resume {SECOND}", f"resume {FIRST}"]
    machine.reset_device(machine.devices[1])
    assert machine.log == whole
    with pytest.raises(OSError, match="reset"):
        machine.reset_device(machine.devices[0])
    assert machine.log == whole * 2


def test_without_peers_nothing_else_happens() -> None:
    machine = Stub(p2p=False)
    machine.reset_device(machine.devices[1])
    machine.devices[2].vfio.resettable = True
    machine.reset_device(machine.devices[2])
    assert machine.log == ["reset the bus", f"reset {OTHER}"]


def test_what_cannot_be_removed_is_not_reset() -> None:
    machine = Stub()
    machine.devices[1].function.refusing = True  # type: ignore[union-attr]
    with pytest.raises(OSError, match="keeps it"):
        machine.reset_device(machine.devices[0])
    assert machine.log == [f"suspend {FIRST}", f"resume {FIRST}"]
    machine.failing = True
    with pytest.raises(NotAssignable):
        machine.reset_device(machine.devices[0])
    assert machine.log == [f"suspend {FIRST}", f"resume {FIRST}"]


def test_a_device_that_is_unplugged_meanwhile_does_not_come_back() -> None:
    machine = Stub()
    first, second, _ = machine.devices
    first.function = None
    with machine._suspended(first):
        second.function = None
    assert machine.log == [f"suspend {SECOND}"]
