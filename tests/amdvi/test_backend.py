"""A machine over each back end: the domain asks nothing else of the IOMMU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.inside import drive_of
from support.living import running
from support.modes import FULL, Mode, through_all_modes, through_compat_too
from support.recording import Calls, recording
from support.witness import iommu_events, merged, traces, without_probe

import kvmpass
from kvmpass import host
from kvmpass.errors import HostNotReady
from kvmpass.layout import GIB, MIB, Range
from kvmpass.machine import AssignedDevice, Machine
from kvmpass.machine.slots import Slots

SIZE = 4 * MIB


@through_all_modes
@pytest.mark.amdvi(duration=13)
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
            ram = [region.range for region in machine.memory if region.kind.dma]
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


@through_compat_too
def test_devices_are_assigned_all_or_none(mode: Mode, nvme: str, nvme2: str, edu: str) -> None:
    """The third is open elsewhere, or cannot be shown to the guest: the others are closed, and nothing is mapped."""
    plug = Slots.plug

    def refuse(slots: Slots, device: AssignedDevice) -> None:
        if str(device.bdf) == edu:
            raise OSError("no slot")
        plug(slots, device)

    with host.borrow(nvme, nvme2, edu) as found, Machine(memory="8M", backend=mode.backend) as machine:
        for attempt in ("open elsewhere", "no slot"):
            with pytest.MonkeyPatch.context() as patch, ExitStack() as obstacle:
                if attempt == "no slot":
                    patch.setattr(Slots, "plug", refuse)
                else:
                    obstacle.enter_context(Path(f"/dev/vfio/{found[2].group}").open("rb+", buffering=0))
                with pytest.raises(OSError, match=r"busy|no slot"):
                    machine.assign_all([nvme, nvme2, edu])
                assert (machine.devices, machine.domain.ledger, mode.locked()) == ([], [], 0)
        devices = machine.assign_all([nvme, nvme2, edu])
        assert machine.devices == devices
        assert [str(device.bdf) for device in devices] == [nvme, nvme2, edu]
        assert len({device.slot for device in devices}) == 3
        machine.audit()


def assign(nvme: str, status: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    words = [sys.executable, "-m", "kvmpass", "assign", *options, "--status-file", str(status), nvme]
    done = subprocess.run([*words, "--", "true"], capture_output=True, text=True, timeout=250, check=False)
    return done, json.loads(status.read_text())


@FULL
def test_auto_uses_iommufd_where_it_is(nvme: str, tmp_path: Path) -> None:
    """The status file and the plan agree."""
    done, status = assign(nvme, tmp_path / "status", "--memory", "96M")
    assert done.returncode == 0, done.stderr
    made = kvmpass.plan([nvme], memory="96M")
    assert str(made.backend) == "iommufd: available to this user"
    assert status["backend"] == {"name": made.backend.name, "reason": made.backend.reason}


@pytest.mark.amdvi(profile="stock")
def test_a_kernel_without_iommufd_is_named(nvme: str, tmp_path: Path) -> None:
    done, status = assign(nvme, tmp_path / "status", "--backend", "iommufd")
    assert done.returncode == 125
    cause = "iommufd was asked for and is unavailable: this kernel has no /dev/iommu"
    assert done.stderr.startswith(f"kvmpass: {cause}\n  hint: use the back end type1, or auto")
    assert (status["backend"], status["error"]["cause"]) == (None, cause)
    assert [blocker.kind for blocker in kvmpass.plan([nvme], backend="iommufd").blockers] == ["no-iommufd"]
    made = kvmpass.plan([nvme])
    assert (str(made.backend), made.blockers) == ("type1: this kernel has no /dev/iommu", ())
    with host.borrow(nvme), Machine(memory="8M", backend="iommufd") as machine:
        with pytest.raises(HostNotReady, match="iommufd is unavailable: this kernel has no /dev/iommu"):
            machine.assign(nvme)
        assert (machine.devices, machine.backend) == ([], None)
    with host.borrow(nvme), Machine(memory="8M", backend="auto") as machine:
        machine.assign(nvme)
        assert str(machine.backend) == "type1: this kernel has no /dev/iommu"
