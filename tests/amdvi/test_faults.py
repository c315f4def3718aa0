"""DMA that is blocked is told: the IOMMU's event, the kernel's log, and our reader of it."""

from __future__ import annotations

import select
import time

import pytest
from support.witness import Edu, pattern

from kvmpass import host
from kvmpass.events import DeviceEvent, DeviceFault
from kvmpass.host.kernel.faults import PAGE_FAULT, FaultLog, IommuEvent
from kvmpass.layout import MIB
from kvmpass.machine import Machine

pytestmark = pytest.mark.usefixtures("as_without_tests")
NOWHERE = 0xD000_0000


def wait_for_fault(log: FaultLog, seconds: float = 20) -> list[IommuEvent]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ready, _, _ = select.select([log], [], [], 1)
        if ready and (faults := log.read()):
            return faults
    return []


@pytest.mark.amdvi(profile="modern", qemu="modern")
def test_a_blocked_access_is_an_event(edu: str, emulated_host: bool) -> None:
    """QEMU's events name the device (on bus 0) and nothing else; real ones name address and domain too."""
    events: list[DeviceEvent] = []
    with FaultLog() as log, host.borrow(edu), Machine(memory=4 * MIB, on_event=events.append) as machine:
        device = Edu(machine.assign(edu))
        data = pattern()
        machine.memory.write(0x1000, data)
        device.load(0x1000)
        device.store(0x2000)
        assert machine.memory.read(0x2000, 16) == data
        assert log.read() == [], "what is mapped makes no fault"
        device.load(NOWHERE)
        faults = wait_for_fault(log)
        assert faults, "the kernel's log says nothing of a read that was blocked"
        assert {(str(fault.bdf), fault.kind) for fault in faults} == {(edu, PAGE_FAULT)}
        if emulated_host:  # docs/lab.md: what the emulator gets wrong
            assert {fault.access for fault in faults} == {"interrupt"}, faults
        if not emulated_host:
            assert {((fault.address or 0) & ~0xFFF, fault.access, bool(fault.domain)) for fault in faults} == {
                (NOWHERE, "read", True)
            }
        deadline = time.monotonic() + 20
        while not any(isinstance(event, DeviceFault) for event in events):
            assert time.monotonic() < deadline, "the machine says nothing of it"
            time.sleep(0.02)
        assert {event.bdf for event in events if isinstance(event, DeviceFault)} == {edu}
        device.store(NOWHERE)
        assert wait_for_fault(log), "the kernel's log says nothing of a write that was blocked"
        assert log.lost == 0
