"""Devices that do not come alone: functions of one device, siblings that stay behind, bridges; resets of a bus."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.inside import SOAK
from support.living import descriptors
from support.modes import Mode, through_all_modes
from support.recording import Calls, recording
from support.type1 import groups_of
from support.witness import Edu, iommu_events, pattern, without_probe

from kvmpass import host
from kvmpass.errors import GroupNotViable, NotAssignable
from kvmpass.events import DeviceEvent, DeviceReset
from kvmpass.layout import MIB, Range
from kvmpass.machine import Machine

SYSFS = Path("/sys/bus/pci")


def driver(bdf: str) -> str | None:
    return host.Sysfs().driver(host.Bdf.parse(bdf))


def sibling_of(bdf: str) -> str:
    group = (SYSFS / "devices" / bdf / "iommu_group/devices").iterdir()
    return next(path.name for path in group if path.name != bdf)


@contextmanager
def without_driver(bdf: str) -> Iterator[None]:
    before = driver(bdf)
    if before:
        (SYSFS / "drivers" / before / "unbind").write_text(bdf)
    try:
        yield
    finally:
        if before:
            (SYSFS / "drivers_probe").write_text(bdf)
            assert driver(bdf) == before


def test_functions_keep_their_numbers(multifunction: str) -> None:
    """Both in one slot, whatever the order on the command line; each drive is there."""
    script = "cd /sys/bus/pci/devices; echo *; ls -1d */nvme/nvme*; cat /sys/class/nvme/*/state; ls -1 /dev/nvme?n1"
    other = sibling_of(multifunction)
    command = [sys.executable, "-m", "kvmpass", "assign", other, multifunction, "--memory", "192M"]
    result = subprocess.run([*command, "--", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["0000:00:00.0", "0000:00:01.0", "0000:00:01.1", "0000:00:1f.0"]
    assert [line.split("/")[0] for line in lines[1:3]] == ["0000:00:01.0", "0000:00:01.1"], lines
    assert lines[3:] == ["live", "live", "/dev/nvme0n1", "/dev/nvme1n1"]
    assert (driver(multifunction), driver(other)) == ("nvme", "nvme")


def test_a_sibling_can_stay_on_the_host(multifunction: str) -> None:
    """Its driver must be unbound; then one function alone is function 0 of its slot."""
    other = sibling_of(multifunction)
    alone = max(multifunction, other)
    with pytest.raises(GroupNotViable, match=re.escape(min(multifunction, other))), host.borrow(alone):
        pass
    with without_driver(min(multifunction, other)), host.borrow(alone), Machine(memory="8M") as machine:
        device = machine.assign(alone)
        assert (device.slot, device.number) == (1, 0)
        machine.audit()


def test_adding_a_function_adds_no_mapping(multifunction: str, edu: str) -> None:
    other = sibling_of(multifunction)
    calls: Calls = []
    with host.borrow(multifunction, other, edu), Machine(memory="8M", backend=recording(calls)) as machine:
        with iommu_events() as events:
            for bdf in sorted((multifunction, other)):
                machine.assign(bdf)
            machine.assign(edu)
        without_probe(events)
        mapped = sum(range_.size for name, range_ in events if name == "map")
        trials = 2 * 4096  # the kernel tries two pages where a group joins
        assert mapped in (8 << 20, (8 << 20) + trials)
        assert calls == [("map", Range(0, 8 << 20))]
        assert len(groups_of(machine)) == 2
        assert [(device.slot, device.number) for device in machine.devices] == [(1, 0), (1, 1), (2, 0)]
        machine.deassign(machine.devices[0])
        machine.audit()
        assert len(groups_of(machine)) == 2, "the other function holds the group"
        machine.reset()
        assert [(device.slot, device.number) for device in machine.devices] == [(2, 0), (1, 0)], (
            "in a slot of its own"
        )
        assert Edu(machine.devices[-1]).bar.read_int(0) == 0x010000ED


@through_all_modes
def test_a_device_behind_a_bridge_of_its_group(mode: Mode, bridged: str) -> None:
    """DMA both ways; and alone on its bus it can be reset with that, and with the machine, again and again."""
    rounds = 200 if SOAK else 2
    events: list[DeviceEvent] = []
    with host.borrow(bridged), Machine(memory="8M", on_event=events.append) as machine:
        device = machine.assign(bridged)
        edu = Edu(device)
        data = pattern()
        machine.memory.write(0x1000, data)
        edu.load(0x1000)
        edu.store(0x2000)
        assert machine.memory.read(0x2000, 16) == data
        edu.bar.write_int(0x04, 0x1234)
        assert edu.bar.read_int(0x04) == 0xFFFF_FFFF & ~0x1234
        event = machine.reset_device(device)
        assert (event.bdf, event.reason) == (bridged, "request")
        assert event in events and isinstance(event, DeviceReset)
        assert event.method in device.reset_methods
        before = None
        for number in range(rounds):
            machine.reset_device(device) if number % 2 else machine.reset()
            device.enable()
            machine.memory.write(0x3000, bytes(16))
            edu.load(0x1000)
            edu.store(0x3000)
            assert machine.memory.read(0x3000, 16) == data, f"it works after reset {number}"
            machine.audit()
            assert mode.locked() == 8 * MIB
            before = before or descriptors()
            assert descriptors() == before


def test_a_bus_with_devices_of_others_is_not_reset(edu: str) -> None:
    with host.borrow(edu), Machine(memory="8M") as machine:
        device = machine.assign(edu)
        if device.vfio.resettable:
            pytest.skip("this device has a reset of its own: the lab's edu on bus 0 has none")
        with pytest.raises((OSError, NotAssignable)):
            machine.reset_device(device)
        assert Edu(device).bar.read_int(0) == 0x010000ED
        machine.audit()


@through_all_modes
@pytest.mark.amdvi(profile="odd")
def test_two_devices_of_a_bus_are_reset_together_or_not_at_all(
    mode: Mode, bridged: str, bridged2: str, edu: str
) -> None:
    """Neither has a reset of its own; VFIO resets the bus when every device on it is ours.

    With type 1 it takes the groups of that bus, and refuses those of others: there is one in the domain. With
    iommufd it takes none.
    """
    with host.borrow(bridged, bridged2, edu), Machine(memory="8M") as machine:
        machine.assign(edu)
        first = machine.assign(bridged)
        assert not first.vfio.resettable
        assert {member.name for member in first.vfio.get_pci_hot_reset_info()} >= {bridged, bridged2}
        with pytest.raises(NotAssignable, match=bridged2):
            machine.reset_device(first)
        second = machine.assign(bridged2)
        assert machine.reset_device(first).method == "bus"
        for device in (
            first,
            second,
        ):  # QEMU's edu keeps its registers over a reset: that both work is what can be seen
            edu = Edu(device)
            data = pattern()
            machine.memory.write(0x1000, data)
            edu.load(0x1000)
            edu.store(0x2000)
            assert machine.memory.read(0x2000, 16) == data
        machine.audit()
