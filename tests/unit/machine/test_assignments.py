"""Several devices for a machine whose guest runs: all or none, also for the guest."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.host import Bdf, Sysfs
from kvmpass.machine import assignments
from kvmpass.machine.assignments import Assignments
from kvmpass.machine.device import AssignedDevice, BoundDevice

DISK, NIC, SOUND = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"


class Stub(Assignments):
    """A machine without KVM and IOMMU; ``fail`` names the step and the device that fails."""

    _running = True  # type: ignore[assignment]

    def __init__(self, fail: tuple[str, str] = ("", "")) -> None:
        super().__init__(1, Sysfs(), None)
        self.fail = fail
        self.calls: list[tuple[str, str]] = []
        monitor: Any = SimpleNamespace(
            follow_faults=lambda: None,
            emit=lambda event: None,
            watch=lambda device, index, work: self.call("watch", device.name),
            unwatch=lambda device: None,
        )
        slots: Any = SimpleNamespace(
            plug=lambda device: self.call("plug", str(device.bdf)),
            unplug=lambda device: self.call("unplug", str(device.bdf)),
            announce=lambda device: self.call("announce", str(device.bdf)),
        )
        domain: Any = SimpleNamespace(
            attach_all=lambda groups, tokens: [self.opened(name) for name in groups],
            detach=lambda device: self.call("detach", device.name),
        )
        self._monitor, self._slots, self.domain = monitor, slots, domain
        self._requests: Any = SimpleNamespace(on_error=print, on_request=print)

    def populate(self) -> None:
        pass

    def call(self, what: str, name: str) -> None:
        self.calls.append((what, name))
        if (what, name) == self.fail:
            raise OSError(f"{what} fails")

    @staticmethod
    def opened(name: str) -> Any:
        config = SimpleNamespace(write=lambda offset, data: None)
        return SimpleNamespace(name=name, resettable=False, resets_at_close=False, config=config)

    def assign_three(self) -> list[AssignedDevice]:
        found = [BoundDevice(Bdf.parse(name), number, ()) for number, name in enumerate((DISK, NIC, SOUND))]
        return self._assign(found, {}, {})

    def names(self, what: str) -> list[str]:
        return [name for step, name in self.calls if step == what]


def test_a_running_guest_hears_of_the_devices_once_all_are_plugged_in() -> None:
    machine = Stub()
    assert machine.assign_three() == machine.devices
    assert machine.names("plug") == machine.names("announce") == [DISK, NIC, SOUND]
    assert machine.calls[-3:] == [("announce", name) for name in (DISK, NIC, SOUND)]


@pytest.mark.parametrize("what", ["watch", "plug"])
def test_a_running_guest_hears_of_none_if_one_fails(what: str) -> None:
    machine = Stub(fail=(what, SOUND))
    with pytest.raises(OSError, match=f"{what} fails"):
        machine.assign_three()
    assert (machine.names("announce"), machine.devices) == ([], [])
    assert machine.names("unplug") == [NIC, DISK]
    assert machine.names("detach") == [SOUND, NIC, DISK]


def test_an_announcement_that_fails_is_undone() -> None:
    machine = Stub(fail=("announce", NIC))
    with pytest.raises(OSError, match="announce fails"):
        machine.assign_three()
    assert machine.devices == []
    assert machine.names("detach") == [SOUND, NIC, DISK]


TOKEN = uuid.UUID(int=7)


@pytest.mark.parametrize("bdf", ["02:00.0", NIC, Bdf.parse(NIC)])
def test_what_belongs_to_a_device_is_by_its_address(bdf: str | Bdf, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, attached = Stub(), []

    def attach_all(groups: dict[str, int], tokens: dict[str, uuid.UUID]) -> list[Any]:
        attached.append((groups, tokens))
        return [machine.opened(name) for name in groups]

    machine.domain.attach_all = attach_all  # type: ignore[method-assign, assignment]
    monkeypatch.setattr(assignments, "find_bound", lambda sysfs, bdf: BoundDevice(bdf, 5, ()))
    machine.assign_all([DISK, NIC], vf_tokens={bdf: TOKEN})  # type: ignore[dict-item]
    assert attached == [({DISK: 5, NIC: 5}, {NIC: TOKEN})]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"vf_tokens": {SOUND: TOKEN}}, f"a VF token of {SOUND}, which is not among the devices"),
        ({"fds": {Bdf.parse(SOUND): 5}}, f"a descriptor of {SOUND}, which is not among the devices"),
    ],
)
def test_what_belongs_to_another_device_is_refused(given: dict[str, Any], match: str) -> None:
    machine = Stub()
    with pytest.raises(ValueError, match=match):
        machine.assign_all([DISK, NIC], **given)
    assert machine.calls == []


def test_what_is_open_is_closed_whatever_fails_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bound: BoundDevice, *rest: Any) -> AssignedDevice:
        if str(bound.bdf) == NIC:
            raise MemoryError
        return AssignedDevice(bound, *rest)

    monkeypatch.setattr(assignments, "AssignedDevice", refuse)
    machine = Stub()
    with pytest.raises(MemoryError):
        machine.assign_three()
    assert sorted(machine.names("detach")) == [DISK, NIC, SOUND]
