"""After every end, normal or not, nothing is left: descriptors, mappings, locked memory, routes, drivers."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.modes import FULL, Mode
from support.type1 import groups_of
from support.witness import Edu, locked_bytes, traces

from kvmpass import host
from kvmpass._eventloop import EventLoop
from kvmpass.errors import DeviceInUse
from kvmpass.iommufd import Iommufd
from kvmpass.kvm import VfioDevice, Vm
from kvmpass.layout import MIB
from kvmpass.machine import AssignedDevice, Machine
from kvmpass.memory import HostMapping
from kvmpass.pci import AssignedFunction, PciBus
from kvmpass.pci.bar import Bar
from kvmpass.pci.barspace import BarSpace
from kvmpass.pci.intx import Intx
from kvmpass.vfio import Cdev, Container, Device, Group, Irqs, Region

Valid = Callable[[str, str | bytes], Any]

Steps = list[tuple[type, str]]

TYPE1_STEPS: Steps = [
    (HostMapping, "populate"),
    (Group, "__init__"),
    (Group, "get_status"),
    (Container, "__init__"),
    (Group, "set_container"),
    (Container, "set_iommu"),
    (Container, "iova_ranges"),
    (Container, "map_dma"),
    (VfioDevice, "file_add"),
    (Group, "get_device_fd"),
    (Device, "_region_info"),
    (Device, "_irq_info"),
    (AssignedDevice, "quiesce"),
    (EventLoop, "add_reader"),
    (Irqs, "set_irqs"),
    (AssignedFunction, "__init__"),
    (BarSpace, "allocate"),
    (Region, "mmap"),
    (Vm, "irqfd_resample"),
    (Irqs, "set_unmask_eventfd"),
    (PciBus, "plug"),
]
# Those that are others than with type 1.
IOMMUFD_STEPS: Steps = [
    (Iommufd, "__init__"),
    (Iommufd, "ioas_alloc"),
    (Cdev, "__init__"),
    (VfioDevice, "file_add"),
    (Cdev, "bind"),
    (Cdev, "attach"),
    (Iommufd, "ioas_iova_ranges"),
    (Iommufd, "ioas_map"),
    (AssignedDevice, "quiesce"),
    (PciBus, "plug"),
]
ASSIGN_STEPS = {"type1": TYPE1_STEPS, "iommufd": IOMMUFD_STEPS}
# Out of the guest's reach: what fails here leaves the device assigned, to be tried again.
UNPLUG_STEPS: Steps = [
    (PciBus, "unplug"),
    (AssignedFunction, "close"),
    (Intx, "disable"),
    (Irqs, "disable_irqs"),
    (Vm, "irqfd_deassign"),
    (Bar, "close"),
    (HostMapping, "close"),
]
DEASSIGN_STEPS: dict[str, Steps] = {
    "type1": [
        (AssignedDevice, "quiesce"),
        (Device, "close"),
        (VfioDevice, "file_del"),
        (Container, "unmap_dma"),
        (Group, "close"),
        (Container, "close"),
    ],
    "iommufd": [
        (Cdev, "detach"),
        (VfioDevice, "file_del"),
        (Device, "close"),
        (Iommufd, "ioas_unmap"),
        (Iommufd, "ioas_unmap_all"),
        (Iommufd, "close"),
    ],
}
with_both = pytest.mark.parametrize("mode", ["type1", pytest.param("iommufd", marks=FULL)], indirect=True)


class Injected(Exception):
    """What the tests raise in the middle."""


def clean() -> None:
    """No VFIO descriptor or mapping of this process, nothing locked."""
    assert traces("vfio|iommu") == []
    assert (locked_bytes(), locked_bytes("VmPin")) == (0, 0)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine(memory="8M") as machine:
        yield machine
    assert traces() == []


@pytest.fixture(scope="module")
def borrowed(edu: str) -> Iterator[str]:
    with host.borrow(edu):
        yield edu
    device = host.Sysfs().device(host.Bdf.parse(edu))
    assert (device.driver, device.driver_override) == (None, None)


class FailOnce:
    """Makes ``owner.name`` raise at its next call once armed, before or after doing its work."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool) -> None:
        self.armed = self.called = False
        real = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if not self.armed or self.called:
                return real(*arguments, **options)
            self.called = True
            if after:
                real(*arguments, **options)
            raise Injected(f"{owner.__name__}.{name}")

        patch.setattr(owner, name, wrapper)


@with_both
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_at_each_step_of_assign(
    mode: Mode, borrowed: str, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Nothing is left, and the same machine takes the device at the next try."""
    for owner, name in ASSIGN_STEPS[mode.name]:
        if after and name in ("__init__", "get_device_fd", "mmap"):
            continue  # what is made and then lost has no owner yet: it cannot fail there
        with Machine(memory="2M") as machine:
            with monkeypatch.context() as patch:
                step = FailOnce(patch, owner, name, after=after)
                step.armed = True
                with pytest.raises(Injected, match=f"{owner.__name__}.{name}"):
                    machine.assign(borrowed)
                assert step.called
            clean()
            assert machine.devices == []
            assert machine.domain.ledger == []
            assert all(region.kind.dma for region in machine.memory)
            machine.audit()
            edu = Edu(machine.assign(borrowed))
            assert edu.bar.read_int(0) == 0x010000ED
            machine.deassign(machine.devices[0])
            clean()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failed_unplug_keeps_the_device_and_can_be_repeated(
    borrowed: str, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    for owner, name in UNPLUG_STEPS:
        with Machine(memory="2M") as machine:
            with monkeypatch.context() as patch:
                step = FailOnce(patch, owner, name, after=after)
                device = machine.assign(borrowed)
                step.armed = True
                with pytest.raises(Injected, match=f"{owner.__name__}.{name}"):
                    machine.deassign(device)
                assert step.called
            assert machine.devices == [device]
            machine.audit()
            machine.deassign(device)
            assert machine.devices == []
            clean()


def test_closing_the_machine_removes_a_device_that_cannot_be_unplugged(
    borrowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KVM keeps every memslot: close raises, and pages are unmapped once the VM cannot run."""
    real = Vm.set_user_memory_region

    def kept(vm: Vm, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        if not size:
            raise OSError(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION: planted")
        real(vm, slot, gpa, size, hva, readonly=readonly)

    machine = Machine(memory="2M")
    device = machine.assign(borrowed)
    device.enable()
    bars = [region for region in machine.memory if not region.kind.dma]
    assert bars
    monkeypatch.setattr(Vm, "set_user_memory_region", kept)
    with pytest.raises(OSError, match="planted"):
        machine.deassign(device)
    assert machine.devices == [device]
    assert all(region.hva and region in list(machine.memory) for region in bars)
    machine.audit()
    with pytest.raises(OSError, match="planted"):
        machine.close()
    assert (machine.devices, machine.memslots.ledger, len(machine.memory)) == ([], [], 0)
    clean()


def test_a_vcpu_that_cannot_be_closed_does_not_stop_the_teardown(
    borrowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck:
        def close(self) -> None:
            raise OSError(errno.ENOMEM, "munmap: planted")

    machine = Machine(memory="2M")
    machine.assign(borrowed)
    monkeypatch.setattr(machine, "_vcpus", [Stuck()])
    with pytest.raises(OSError, match="planted"):
        machine.close()
    assert (machine.devices, machine.memslots.ledger, len(machine.memory)) == ([], [], 0)
    clean()


def test_a_group_that_cannot_leave_stays_until_the_end(borrowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Machine(memory="2M") as machine:
        device = machine.assign(borrowed)
        with monkeypatch.context() as patch:
            step = FailOnce(patch, Group, "unset_container", after=False)
            step.armed = True
            with pytest.raises(Injected):
                machine.deassign(device)
        assert (machine.devices, list(groups_of(machine))) == ([], [device.group])
    clean()


@with_both
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_at_each_step_of_deassign(
    mode: Mode, borrowed: str, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Nothing is left in the process at once; what KVM itself still holds goes with the machine."""
    for owner, name in DEASSIGN_STEPS[mode.name]:
        if not after and name == "close":
            continue  # a close that does not close leaves its descriptor by definition
        with monkeypatch.context() as patch, Machine(memory="2M") as machine:
            step = FailOnce(patch, owner, name, after=after)
            device = machine.assign(borrowed)
            step.armed = True
            with pytest.raises(Injected, match=f"{owner.__name__}.{name}"):
                machine.deassign(device)
            assert step.called
            clean()
            assert machine.devices == []
            assert machine.domain.ledger == []
            machine.audit()


def test_closing_twice_and_in_any_state(borrowed: str) -> None:
    machine = Machine(memory="2M")
    device = machine.assign(borrowed)
    machine.close()
    machine.close()
    machine.deassign(device)
    clean()


def test_an_exception_in_the_with_block(borrowed: str) -> None:
    with pytest.raises(Injected), Machine(memory="2M") as machine:
        machine.assign(borrowed)
        assert locked_bytes() == 2 * MIB
        raise Injected
    clean()


def test_a_device_is_assigned_once(machine: Machine, borrowed: str) -> None:
    device = machine.assign(borrowed)
    with pytest.raises(DeviceInUse, match="in this domain already"):
        machine.assign(borrowed)
    machine.audit()
    with Machine(memory="2M") as other, pytest.raises(OSError, match=f"/dev/vfio/{device.group}"):
        other.assign(borrowed)
    machine.deassign(device)
    clean()


# --- the command, interrupted


def kvmpass(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvmpass", *arguments]


def state_of(bdf: str) -> tuple[str | None, str | None]:
    device = host.Sysfs().device(host.Bdf.parse(bdf))
    return device.driver, device.driver_override


def start_and_wait_for(text: str, command: list[str]) -> subprocess.Popen[str]:
    """Start a command and read its standard error until a line has ``text``."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if text in line:
            return process
    raise AssertionError(f"{command} never said {text!r}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("usual_signals")
def test_interrupted_while_the_guest_runs(nvme: str, tmp_path: Path, number: int, status: int, valid: Valid) -> None:
    before = state_of(nvme)
    report = tmp_path / "status.json"
    process = start_and_wait_for(
        "audit: ok",
        kvmpass("assign", "-v", nvme, "--memory", "128M", "--status-file", str(report), "--", "sleep", "1000"),
    )
    assert state_of(nvme) == ("vfio-pci", "vfio-pci")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert state_of(nvme) == before
    told = valid("status-file", report.read_text())
    assert (told["outcome"], told["exit_status"]) == ("interrupted", status)


@pytest.mark.usefixtures("usual_signals")
def test_a_stalled_reader_does_not_delay_the_release(nvme: str) -> None:
    """A guest writes without end and nobody reads: at SIGTERM the device is still rebound."""
    before = state_of(nvme)
    process = subprocess.Popen(
        kvmpass("assign", nvme, "--memory", "128M", "--", "yes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"y\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.communicate()
    assert state_of(nvme) == before


# A write to the destination of files does not return, as on a file system whose server is gone.
STALLED = """
import os, sys
from kvmpass.guest.extract import Extraction
never, _ = os.pipe()
Extraction.content = lambda self, data: os.read(never, 1)
from kvmpass.__main__ import main
main()
"""


@pytest.mark.usefixtures("usual_signals")
def test_a_stalled_destination_does_not_delay_the_release(nvme: str, tmp_path: Path) -> None:
    """The device is rebound although a file is never written, and Ctrl-C ends what waits for it."""
    before = state_of(nvme)
    words = ["assign", nvme, "--memory", "128M", "--copy-out", f"/etc/passwd:{tmp_path}/", "--", "true"]
    process = subprocess.Popen([sys.executable, "-c", STALLED, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "passwd").exists() or state_of(nvme) != before:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors


def test_a_closed_output_ends_the_guest(nvme: str) -> None:
    before = state_of(nvme)
    process = subprocess.Popen(
        kvmpass("assign", nvme, "--memory", "128M", "--", "yes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(60) == 125
    assert b"output closed by its reader" in process.stderr.read()
    process.stderr.close()
    assert state_of(nvme) == before


def test_killed_while_the_guest_runs(nvme: str) -> None:
    before = state_of(nvme)
    process = start_and_wait_for(
        "audit: ok", kvmpass("assign", "-v", nvme, "--memory", "128M", "--", "sleep", "1000")
    )
    process.kill()
    process.communicate()
    assert state_of(nvme) == ("vfio-pci", "vfio-pci")
    first, second = (
        subprocess.run(kvmpass("restore"), capture_output=True, text=True, check=True, timeout=60).stdout
        for _ in range(2)
    )
    assert f"{nvme}: restored" in first
    assert nvme not in second
    assert state_of(nvme) == before


def test_killed_at_random_moments(edu2: str) -> None:
    """Wherever SIGKILL hits, ``restore`` makes it as it was; without a driver that is quick to check."""
    before = state_of(edu2)
    for delay in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        process = subprocess.Popen(
            kvmpass("assign", edu2, "--memory", "64M", "--", "true"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.kill()
        process.wait()
        host.restore()
        assert state_of(edu2) == before
    assert edu2 not in [result.bdf for result in host.restore()]
