"""A machine over each back end: the domain asks nothing else of the IOMMU."""

from __future__ import annotations

import hashlib
import os

from support.inside import drive_of
from support.living import running
from support.modes import Mode, through_all_modes
from support.recording import Calls, recording
from support.witness import iommu_events, merged, traces, without_probe

from kvmpass import host
from kvmpass.layout import GIB, MIB, Range

SIZE = 4 * MIB


@through_all_modes
def test_a_guest_does_io_over_each_back_end(mode: Mode, nvme: str, edu: str, destructive: None) -> None:
    """The guest reads and writes its drive; memory and a second device come while it runs, and all of them go."""
    before = os.urandom(SIZE)
    drive_of(nvme).write_bytes(before)
    calls: Calls = []
    script = """wait_for drive; dd if=$drive bs=64k count=64 2>/dev/null | sha256sum
        dd if=$drive of=$drive bs=1M count=1 seek=1 conv=fsync 2>/dev/null; echo copied; go_on; sync"""
    with host.borrow(nvme, edu):
        with iommu_events() as events, running(script, nvme, backend=recording(calls, mode.backend)) as guest:
            machine = guest.machine
            ram = [region.range for region in machine.memory if region.dma]
            guest.expect("copied")
            assert hashlib.sha256(before).hexdigest() in guest.said
            machine.assign(edu)
            machine.audit()
            assert calls == [("map", range_) for range_ in ram], "the second device adds none"
            extra = machine.memory.add_ram(5 * GIB, MIB, "extra")
            assert mode.locked() == sum(range_.size for range_ in ram) + MIB
            machine.memory.remove(extra)
            assert calls[len(ram) :] == [("map", Range(5 * GIB, MIB)), ("unmap", Range(5 * GIB, MIB))]
            machine.audit()
            guest.go_on()
            assert guest.end().status == 0
        without_probe(events)
        for operation in ("map", "unmap"):
            ours = [range_ for name, range_ in calls if name == operation]
            seen = [range_ for name, range_ in events if name == operation and any(map(range_.overlaps, ours))]
            assert merged(seen) == merged(ours)
    assert traces("vfio|iommu") == []
    with drive_of(nvme).open("rb") as drive:
        assert drive.read(SIZE) == before[:MIB] + before[:MIB] + before[2 * MIB :]
