"""Devices are taken from real drivers and given back to them, whatever happens in between."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.drivers import SYSFS, Child, facts, look, namespace, until

from kvmpass import host
from kvmpass.errors import (
    DeviceInUse,
    GroupNotViable,
    HostNotReady,
    NoSuchDevice,
    NotAssignable,
    NotEnoughMemory,
    RestoreFailed,
)
from kvmpass.host import Bdf, check_assignable
from kvmpass.host.descriptors import identify
from kvmpass.host.drivers.changes import Step
from kvmpass.vfio import Cdev

TAKING = [Step.RECORDED, Step.OVERRIDE, Step.UNBIND, Step.PROBE, Step.BOUND]
RETURNING = [
    Step.RETURN_PREPARE,
    Step.RETURN_UNBIND,
    Step.RETURN_PROBE,
    Step.RETURN_OVERRIDE,
    Step.RETURN_POWER,
    Step.RETURNED,
]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def untouched(nvme: str, edu: str, state: Path) -> Iterator[None]:
    """Whatever the test does: in the end every device of the host is as it was, and the journal is empty."""
    before = facts()
    yield
    assert facts() == before
    assert not list((state / "journal").glob("*"))
    if look(nvme).driver == "nvme":
        namespace(nvme)


# --- there and back


@pytest.mark.parametrize("role", ["nvme", "edu", "nic"])
@pytest.mark.usefixtures("untouched")
def test_there_and_back(role: str, request: pytest.FixtureRequest) -> None:
    bdf = request.getfixturevalue(role)
    others = [fact for fact in facts() if str(fact[0]) != bdf]
    with host.borrow(bdf) as [device]:
        assert (device.driver, device.driver_override) == ("vfio-pci", "vfio-pci")
        assert Path(f"/dev/vfio/{device.group}").exists()
        assert [fact for fact in facts() if str(fact[0]) != bdf] == others
        assert (host.restore()[0].bdf, host.restore()[0].outcome) == (bdf, "owner-alive")


@pytest.mark.usefixtures("untouched")
def test_two_at_once(nvme: str, edu: str) -> None:
    with host.borrow(nvme, edu) as devices:
        assert [str(device.bdf) for device in devices] == [nvme, edu]
        assert {device.driver for device in devices} == {"vfio-pci"}


@pytest.mark.amdvi(profile="stock")  # the full kernel has no CONFIG_PM
@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_runtime_power_management_is_kept(nvme: str, wanted: str) -> None:
    control = Path("/sys/bus/pci/devices", nvme, "power/control")
    if not control.exists():
        pytest.skip("a kernel without power management has nothing to keep; CONFIG_PM=y would have")
    before = control.read_text()
    control.write_text(wanted)
    try:
        with host.borrow(nvme):
            pass
        assert control.read_text().strip() == wanted
    finally:
        control.write_text(before)


@pytest.mark.usefixtures("untouched")
def test_a_device_on_vfio_pci_stays_there(edu: str) -> None:
    with host.borrow(edu):
        os.environ["KVMPASS_STATE_DIR"] += "-other"  # somebody who does not know of this borrowing
        with host.borrow(edu) as [device]:
            assert device.driver == "vfio-pci"
        assert look(edu).driver == "vfio-pci"


# --- failures, signals, kills


@pytest.mark.parametrize("step", TAKING + RETURNING)
@pytest.mark.usefixtures("untouched")
def test_a_failure_at_each_step(nvme: str, step: Step) -> None:
    reached: list[Step] = []

    def hook(now: Step, bdf: Bdf) -> None:
        if now == step and step not in reached:
            reached.append(now)
            raise RuntimeError("injected")

    if step in TAKING:
        with pytest.raises(RuntimeError, match="injected"), host.borrow(nvme, on_step=hook):
            pytest.fail("the block must not run")
    else:
        with host.borrow(nvme, on_step=hook):
            pass
    assert reached == [step]


@pytest.mark.parametrize("step", TAKING + RETURNING)
@pytest.mark.usefixtures("untouched")
def test_killed_at_each_step(nvme: str, step: Step) -> None:
    def hook(now: Step, bdf: Bdf) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with host.borrow(nvme, on_step=hook):
            pass

    assert Child(work).wait() == -signal.SIGKILL
    restore_all()


def restore_all() -> None:
    assert all(result.outcome == "restored" for result in host.restore())
    assert host.restore() == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("untouched")
def test_killed_at_any_moment(nvme: str, seed: int) -> None:
    """Also inside of a write: the kernel, or the process that writes, goes on for a while after the kill."""

    def work() -> None:
        while True:
            with host.borrow(nvme):
                pass

    child = Child(work)
    time.sleep(random.Random(seed).uniform(0.2, 2.0))
    assert child.kill() == -signal.SIGKILL
    restore_all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("untouched", "usual_signals")
def test_signals_at_any_moment(nvme: str, number: signal.Signals, seed: int) -> None:
    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)

    def work() -> None:
        while True:
            with host.borrow(nvme):
                time.sleep(0.05)

    try:
        child = Child(work)
    finally:
        signal.signal(signal.SIGTERM, before)
    time.sleep(random.Random(seed).uniform(0.2, 2.0))
    assert child.kill(number) == 7


@pytest.mark.usefixtures("untouched")
def test_killed_and_the_command_restores(nvme: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "kvmpass", *words], capture_output=True, text=True, check=False)

    def command() -> tuple[int, str]:
        done = run("restore")
        assert done.stderr == ""
        return done.returncode, done.stdout

    def listed() -> str:
        return run("list", nvme).stderr

    def work() -> None:
        with host.borrow(nvme):
            time.sleep(60)

    child = Child(work)
    until(lambda: look(nvme).driver == "vfio-pci")
    status, output = command()
    assert (status, output.startswith(f"{nvme}: owner-alive: in use by process {child.pid} (")) == (0, True)
    assert listed() == ""
    child.kill()
    left = f"kvmpass: a killed kvmpass did not restore {nvme}\n  hint: run kvmpass restore\n"
    assert listed() == left
    assert command() == (0, f"{nvme}: restored: driver nvme\n")
    assert listed() == ""
    assert command() == (0, "nothing to restore\n")


@pytest.mark.usefixtures("untouched")
def test_a_device_still_open_is_not_unbound(edu: str) -> None:
    """The kernel would wait for this process, and this process for the kernel."""
    borrowed = host.borrow(edu)
    [device] = borrowed.__enter__()
    group = os.open(f"/dev/vfio/{device.group}", os.O_RDWR)
    with pytest.raises(RestoreFailed, match="still open in process"):
        borrowed.close()
    assert look(edu).driver == "vfio-pci"
    os.close(group)
    borrowed.close()


# --- refusals


def refused(kind: type[Exception], bdf: str, match: str) -> str:
    """Borrowing is refused with that reason in one line, and nothing changes."""
    before = facts()
    with pytest.raises(kind, match=match) as caught, host.borrow(bdf):
        pytest.fail("the block must not run")
    assert facts() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bridges_and_the_iommu_itself() -> None:
    for device in SYSFS.devices():
        if device.is_bridge:
            refused(NotAssignable, str(device.bdf), "bridge")
        elif device.class_code >> 8 == 0x0806:
            refused(NotAssignable, str(device.bdf), "no IOMMU group")


def test_no_such_device() -> None:
    refused(NoSuchDevice, "00ff:1f:1f.7", "there is no PCI device 00ff:1f:1f.7")


def test_a_sibling_in_use(multifunction: str) -> None:
    group = look(multifunction).group
    assert group is not None
    (sibling, *_) = (bdf for bdf in SYSFS.group(group).devices if str(bdf) != multifunction)
    refused(GroupNotViable, multifunction, rf"group {group} with .*{sibling} \(driver \w+\)")


def test_a_whole_group_together(multifunction: str) -> None:
    group = look(multifunction).group
    assert group is not None
    before = facts()
    with host.borrow(*SYSFS.group(group).devices) as devices:
        assert {device.driver for device in devices} == {"vfio-pci"}
    assert facts() == before


def test_a_group_with_a_bridge(bridged: str) -> None:
    before = facts()
    with host.borrow(bridged) as [device]:
        os.close(os.open(f"/dev/vfio/{device.group}", os.O_RDWR))
    assert facts() == before


@pytest.mark.amdvi(profile="sriov", qemu="system")
def test_no_group(virtual_function: str) -> None:
    refused(NotAssignable, virtual_function, "no IOMMU group")


@pytest.mark.amdvi(profile="sriov")
def test_virtual_functions_would_vanish(sriov: str, virtual_function: str) -> None:
    refused(DeviceInUse, sriov, "1 virtual functions are enabled")


@pytest.mark.usefixtures("untouched")
def test_assigned_by_another_process(edu: str) -> None:
    with host.borrow(edu) as [device]:
        holder = subprocess.Popen(["sleep", "60"], stdin=os.open(f"/dev/vfio/{device.group}", os.O_RDWR))
        try:
            with pytest.raises(DeviceInUse, match="this very process"):
                check_assignable(SYSFS, device.bdf)
            for number in Path("/proc/self/fd").iterdir():
                if number.is_symlink() and str(number.readlink()) == f"/dev/vfio/{device.group}":
                    os.close(int(number.name))
            with pytest.raises(DeviceInUse, match=rf"{edu} is assigned by process {holder.pid} \(sleep\)"):
                check_assignable(SYSFS, device.bdf)
        finally:
            holder.kill()
            holder.wait()


@pytest.mark.usefixtures("untouched", "usual_signals")
def test_borrowed_by_another_process(nvme: str) -> None:
    def work() -> None:
        with host.borrow(nvme):
            time.sleep(60)

    child = Child(work)
    until(lambda: look(nvme).driver == "vfio-pci" and bool(host.restore()))
    refused(DeviceInUse, nvme, rf"{nvme} is assigned by process {child.pid} \(")
    [status] = host.inventory(host.Sysfs(), [nvme]).devices
    assert [blocker.kind for blocker in status.blockers] == ["assigned"], "list knows what the journal knows"
    assert child.kill(signal.SIGINT) == 7


@pytest.mark.usefixtures("untouched")
def test_an_open_node(nvme: str) -> None:
    with Path("/dev", namespace(nvme)).open("rb"):
        refused(DeviceInUse, nvme, rf"/dev/{namespace(nvme)} is open in process {os.getpid()} ")


@pytest.mark.destructive
@pytest.mark.usefixtures("untouched")
def test_mounted(nvme: str, tmp_path: Path) -> None:
    node = f"/dev/{namespace(nvme)}"
    subprocess.run(["mkfs.ext4", "-q", "-F", node, "8192"], check=True)
    place = tmp_path / "a place"
    place.mkdir()
    subprocess.run(["mount", node, place], check=True)
    try:
        refused(DeviceInUse, nvme, f"{node} is mounted at {place}")
    finally:
        subprocess.run(["umount", place], check=True)
    script = f"mount {node} '{place}' && echo mounted && exec sleep 60"
    elsewhere = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE)
    try:
        assert elsewhere.stdout is not None
        assert elsewhere.stdout.readline() == b"mounted\n"
        refused(DeviceInUse, nvme, f"{node} is .*mounted at {place} for process {elsewhere.pid} ")
    finally:
        elsewhere.kill()
        elsewhere.communicate()
    until(lambda: not list(_reasons(nvme)))


def _reasons(bdf: str) -> Iterator[str]:
    try:
        check_assignable(SYSFS, Bdf.parse(bdf))
    except DeviceInUse as error:
        yield str(error)


@pytest.mark.destructive
@pytest.mark.usefixtures("untouched")
def test_swap(nvme: str) -> None:
    node = f"/dev/{namespace(nvme)}"
    subprocess.run(["mkswap", node], check=True, capture_output=True)
    subprocess.run(["swapon", node], check=True)
    try:
        refused(DeviceInUse, nvme, f"{node} is swap")
    finally:
        subprocess.run(["swapoff", node], check=True)


@pytest.mark.usefixtures("untouched")
def test_a_holder(nvme: str) -> None:
    if shutil.which("dmsetup") is None or not any("dm" in line for line in Path("/proc/misc").read_text().split()):
        assert shutil.which("modprobe")
        subprocess.run(["modprobe", "dm-mod"], check=False)
    node = f"/dev/{namespace(nvme)}"
    table = f"0 8 linear {node} 0"
    subprocess.run(["dmsetup", "create", "kvmpass-test", "--readonly", "--noudevsync", "--table", table], check=True)
    try:
        refused(DeviceInUse, nvme, f"{node} is held by kvmpass-test")
    finally:
        subprocess.run(["dmsetup", "remove", "--noudevsync", "kvmpass-test"], check=True)


def test_the_default_route(nic: str) -> None:
    (name,) = (path.name for path in Path("/sys/bus/pci/devices", nic, "net").iterdir())
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    subprocess.run(["ip", "route", "add", "default", "dev", name, "metric", "4000"], check=True)
    try:
        refused(DeviceInUse, nic, f"the default route goes through {name}")
    finally:
        subprocess.run(["ip", "route", "del", "default", "dev", name, "metric", "4000"], check=True)
        subprocess.run(["ip", "link", "set", name, "down"], check=True)


# --- the host


def test_this_host_is_ready() -> None:
    host.doctor.check_host(SYSFS)
    [remapping] = [finding for finding in host.diagnose(SYSFS) if finding.check == "interrupt-remapping"]
    assert remapping.summary == "on"


def test_without_privilege(nvme: str) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
        os.setuid(65534)
        with pytest.raises(PermissionError, match="driver_override"), host.borrow(nvme):
            pass
        with pytest.raises(NotEnoughMemory, match="may lock 8 MiB"):
            host.doctor.check_memory(SYSFS, 64 << 20)
        Path("/dev/kvm").stat()
        if not os.access("/dev/kvm", os.R_OK):
            with pytest.raises(PermissionError, match="/dev/kvm"):
                host.doctor.check_host(SYSFS)

    assert Child(work).wait() == 0


def test_more_memory_than_there_is() -> None:
    with pytest.raises(NotEnoughMemory, match="are available on this host"):
        host.doctor.check_memory(SYSFS, 1 << 50)
    host.doctor.check_memory(SYSFS, 64 << 20)


@pytest.mark.parametrize(
    "reason",
    [
        pytest.param("AMD-V is absent or off", marks=pytest.mark.amdvi(profile="no-svm")),
        pytest.param("AMD-Vi is off: the firmware describes no IOMMU", marks=pytest.mark.amdvi(profile="no-iommu")),
        pytest.param("interrupt remapping is off", marks=pytest.mark.amdvi(profile="no-intremap")),
    ],
)
def test_a_host_that_is_not_ready(reason: str) -> None:
    with pytest.raises(HostNotReady, match=reason):
        host.doctor.check_host(SYSFS)


@pytest.mark.amdvi(profile="no-iommu")
def test_no_groups_at_all(edu: str) -> None:
    refused(NotAssignable, edu, "no IOMMU group")


@pytest.mark.amdvi(profile="no-iommu", kernel="full")
def test_a_no_iommu_group(edu: str) -> None:
    switch = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    override = Path("/sys/bus/pci/devices", edu, "driver_override")
    switch.write_text("Y")
    override.write_text("vfio-pci\n")
    try:
        Path("/sys/bus/pci/drivers_probe").write_text(edu)
        refused(NotAssignable, edu, "no-IOMMU group")
        if host.Sysfs().kernel() >= (7, 3):  # before there is no node
            with pytest.raises(NotAssignable, match=r"noiommu-vfio\d+ .*would not be translated"):
                Cdev(edu)
        else:
            with pytest.raises(FileNotFoundError):
                Cdev(edu)
        (node,) = Path("/dev/vfio").glob("noiommu-*")
        with node.open("rb") as passed, pytest.raises(NotAssignable, match=f"is {node.name} of VFIO"):
            identify(SYSFS, passed.fileno())
    finally:
        Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text(edu)
        override.write_text("\n")
        switch.write_text("N")
