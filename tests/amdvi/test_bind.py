"""Devices are bound to vfio-pci for good, and given back to real drivers, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.at_step import AtStep
from support.drivers import PCI, SYSFS, Child, facts, look, namespace, replug, set_driver, unplug
from support.inside import SOAK

from kvmpass import host
from kvmpass.errors import DeviceInUse, KvmpassError, NoSuchDevice, NotAssignable, RestoreFailed
from kvmpass.host.drivers.bind import Handover
from kvmpass.host.drivers.changes import Step

BINDING = [Step.RECORDED, Step.OVERRIDE, Step.UNBIND, Step.PROBE, Step.BOUND]
UNBINDING = [
    Step.RECORDED,
    Step.RETURN_PREPARE,
    Step.RETURN_UNBIND,
    Step.RETURN_PROBE,
    Step.RETURN_OVERRIDE,
    Step.RETURN_POWER,
    Step.RETURNED,
]
EVERY_STEP = [("bind", step) for step in BINDING] + [("unbind", step) for step in UNBINDING]
SECONDS = 120.0 if SOAK else 6.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def untouched(state: Path) -> Iterator[None]:
    """Whatever the test does: in the end every device of the host is as it was, and nothing is left on disk."""
    before = facts(group=False)
    yield
    assert facts(group=False) == before
    assert files(state) == {}


def files(state: Path) -> dict[str, str]:
    return {str(path.relative_to(state)): path.read_text() for path in sorted(state.glob("*/*"))}


def driver(bdf: str) -> str | None:
    return look(bdf).driver


def run(operation: str, *bdfs: str, **options: Any) -> list[Handover]:
    return (host.bind if operation == "bind" else host.unbind)(bdfs, **options)


def prepare(operation: str, bdf: str) -> None:
    if operation == "unbind":
        host.bind([bdf])


def finish(bdf: str) -> None:
    host.unbind([bdf])
    if driver(bdf) == "nvme":
        namespace(bdf)


@pytest.fixture
def at_step() -> AtStep:
    return AtStep()


# --- there and back


@pytest.mark.parametrize("role", ["nvme", "edu", "nic"])
def test_there_and_back(role: str, request: pytest.FixtureRequest, state: Path) -> None:
    bdf = request.getfixturevalue(role)
    before = driver(bdf)
    [there] = host.bind([bdf])
    assert (there.outcome, there.before, there.after) == ("changed", before, "vfio-pci")
    assert Path(f"/dev/vfio/{look(bdf).group}").exists()
    assert list(files(state)) == [f"bound/{bdf}.json"]
    assert host.restore() == []
    assert host.bind([bdf])[0].outcome == "already"
    [back] = host.unbind([bdf])
    assert (back.outcome, back.before, back.after) == ("changed", "vfio-pci", before)
    assert host.unbind([bdf])[0].outcome == "already"


def test_the_commands(nvme: str, edu: str) -> None:
    def command(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "kvmpass", *words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    devices = json.loads(command("bind", "--json", nvme, edu))["devices"]
    assert [(device["driver_before"], device["driver_after"]) for device in devices] == [
        ("nvme", "vfio-pci"),
        (None, "vfio-pci"),
    ]
    assert command("unbind", nvme, edu) == f"{nvme}  vfio-pci -> nvme\n{edu}  vfio-pci -> no driver\n"
    namespace(nvme)


def test_a_group(multifunction: str, bridged: str) -> None:
    number = look(multifunction).group
    assert number is not None
    members = SYSFS.group(number).devices
    [alone] = host.bind([multifunction])
    assert f"shares IOMMU group {number} with" in alone.warnings[0]
    results = host.bind([multifunction, bridged], group=True)
    assert {result.bdf for result in results} > set(members)
    assert {result.outcome for result in results if result.bdf in members} == {"already", "changed"}
    bridges = [result for result in results if result.outcome == "excluded"]
    assert [look(str(result.bdf)).is_bridge for result in bridges] == [True]
    os.close(os.open(f"/dev/vfio/{number}", os.O_RDWR))
    host.unbind([multifunction, bridged], group=True)


def test_bound_by_somebody_else(nvme: str) -> None:
    set_driver(nvme, "vfio-pci")
    assert host.unbind([nvme])[0].after == "nvme"
    namespace(nvme)


def test_vfio_pci_was_told_to_take_all_of_that_kind(edu: str) -> None:
    """With vfio-pci.ids or new_id the kernel's matching finds vfio-pci again."""
    before = {str(device.bdf) for device in SYSFS.devices() if device.driver == "vfio-pci"}
    identity = f"{look(edu).vendor:04x} {look(edu).device:04x}"
    (PCI / "drivers/vfio-pci/new_id").write_text(identity)
    try:
        assert driver(edu) == "vfio-pci"
        with pytest.raises(RestoreFailed, match=f"vfio-pci has bound {edu} again") as caught:
            host.unbind([edu])
        assert f"echo {identity} > /sys/bus/pci/drivers/vfio-pci/remove_id" in caught.value.__notes__[0]
        assert driver(edu) == "vfio-pci"
    finally:
        (PCI / "drivers/vfio-pci/remove_id").write_text(identity)
        for device in SYSFS.devices():
            if device.driver == "vfio-pci" and str(device.bdf) not in before:
                (PCI / "drivers/vfio-pci/unbind").write_text(str(device.bdf))


def test_a_borrower_leaves_it_bound_and_so_does_one_that_is_killed(edu: str, state: Path) -> None:
    host.bind([edu])
    before = facts(), files(state)
    with host.borrow(edu), pytest.raises(DeviceInUse, match=rf"{edu} is assigned by process {os.getpid()} \("):
        host.unbind([edu], force=True)

    def work() -> None:
        with host.borrow(edu):
            os.kill(os.getpid(), signal.SIGKILL)

    assert (facts(), files(state)) == before
    assert Child(work).wait() == -signal.SIGKILL
    assert [(result.outcome, result.operation) for result in host.restore()] == [("restored", "assign")]
    assert (facts(), files(state)) == before
    host.unbind([edu])


def test_what_the_host_uses(nvme: str) -> None:
    with Path("/dev", namespace(nvme)).open("rb"):
        before = facts()
        for dry_run in (True, False):
            with pytest.raises(DeviceInUse, match=rf"/dev/{namespace(nvme)} is open in process {os.getpid()} "):
                host.bind([nvme], dry_run=dry_run)
        assert facts() == before
        [result] = host.bind([nvme], force=True)
        assert result.after == "vfio-pci"
        assert "is open in process" in result.warnings[0]
    finish(nvme)


def test_what_a_process_has_open_through_vfio_is_never_forced(edu: str) -> None:
    """The kernel would wait for that process: an unbind that is not killed by anything."""
    host.bind([edu])
    with subprocess.Popen(
        ["sleep", "60"], stdin=(node := os.open(f"/dev/vfio/{look(edu).group}", os.O_RDWR))
    ) as holder:
        os.close(node)
        for force in (False, True):
            with pytest.raises(DeviceInUse, match=rf"{edu} is assigned by process {holder.pid} \(sleep\)"):
                host.unbind([edu], force=force)
        assert host.bind([edu])[0].outcome == "already"
        holder.kill()
    host.unbind([edu])


def test_without_privilege(nvme: str, edu: str, state: Path) -> None:
    host.bind([edu])

    def work() -> None:
        os.setuid(65534)
        for operation, bdf in (("bind", nvme), ("unbind", edu)):
            with pytest.raises(PermissionError, match="driver_override") as caught:
                run(operation, bdf)
            assert "run as root" in caught.value.__notes__[0]

    before = facts(), files(state)
    assert Child(work).wait() == 0
    assert (facts(), files(state)) == before
    host.unbind([edu])


@pytest.mark.amdvi(duration=20)
def test_a_user_assigns_what_root_has_bound(nvme: str, edu: str, state: Path) -> None:
    """With the rights to the nodes and to locked memory that doctor asks for; what is not bound still needs root."""
    host.bind([nvme])
    nodes = [Path("/dev/kvm"), Path("/dev/vfio/vfio"), Path(f"/dev/vfio/{look(nvme).group}")]
    modes = {node: stat.S_IMODE(node.stat().st_mode) for node in nodes}
    user = ["prlimit", "--memlock=unlimited", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

    def as_user(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*user, sys.executable, "-m", "kvmpass", *words]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)

    try:
        for node in nodes:
            node.chmod(0o666)
        before = facts(), files(state)
        done = as_user("doctor", nvme, "--memory", "192M")
        assert (done.returncode, "FAIL" in done.stdout) == (0, False), done.stdout
        done = as_user("assign", nvme, "--memory", "192M", "--", "sh", "-c", "id -u; test -b /dev/nvme0n1")
        assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
        done = as_user("assign", nvme, edu, "--memory", "192M", "--", "true")
        assert done.returncode == 125
        assert f"{edu}/driver_override: Permission denied" in done.stderr
        assert (facts(), files(state)) == before
    finally:
        for node, mode in modes.items():
            node.chmod(mode)
        host.unbind([nvme])
        namespace(nvme)


# --- killed


@pytest.mark.parametrize(("operation", "step"), EVERY_STEP)
def test_killed_at_each_step(operation: str, step: Step, nvme: str, state: Path, at_step: AtStep) -> None:
    prepare(operation, nvme)
    before = facts(), files(state)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert Child(lambda: run(operation, nvme, on_step=at_step.hook)).wait() == -signal.SIGKILL
    at_step(step, lambda: None)
    assert [(result.bdf, result.outcome, result.operation) for result in host.restore()] == [
        (nvme, "restored", operation)
    ]
    assert (facts(), files(state)) == before
    assert host.restore() == []
    assert (facts(), files(state)) == before
    finish(nvme)


@pytest.mark.parametrize("seed", range(40 if SOAK else 2))
def test_killed_at_any_moment(seed: int, nvme: str, state: Path) -> None:
    """Also inside of a write, and between the entry and the record: one of the two states it is in the end."""

    def work() -> None:
        while True:
            host.bind([nvme])
            host.unbind([nvme])

    child = Child(work)
    time.sleep(random.Random(seed).uniform(0.2, 2.0))
    assert child.kill() == -signal.SIGKILL
    assert all(result.outcome == "restored" for result in host.restore())
    assert host.restore() == []
    assert driver(nvme) in ("nvme", "vfio-pci")
    assert list(files(state)) == ([f"bound/{nvme}.json"] if driver(nvme) == "vfio-pci" else [])
    finish(nvme)


@pytest.mark.parametrize(("operation", "step"), [("bind", Step.PROBE), ("unbind", Step.RETURN_PROBE)])
@pytest.mark.usefixtures("usual_signals")
def test_interrupted_between_two_drivers(operation: str, step: Step, nvme: str, state: Path, at_step: AtStep) -> None:
    prepare(operation, nvme)
    before = facts(), files(state)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert Child(lambda: run(operation, nvme, on_step=at_step.hook)).wait() == 7
    at_step(step, lambda: None)
    assert (facts(), files(state)) == before
    finish(nvme)


# --- other hands


@pytest.mark.parametrize("step", [Step.OVERRIDE, Step.PROBE, Step.BOUND])
def test_it_vanishes_while_it_is_bound(step: Step, edu: str, state: Path, at_step: AtStep) -> None:
    at_step(step, lambda: unplug(edu))
    try:
        with pytest.raises(NoSuchDevice, match=f"there is no PCI device {edu} any more"):
            host.bind([edu], on_step=at_step.hook)
        assert files(state) == {}
        assert host.restore() == []
    finally:
        (PCI / "rescan").write_text("1")


@pytest.mark.parametrize("step", [Step.RETURN_PREPARE, Step.RETURN_PROBE, Step.RETURNED])
def test_it_vanishes_while_it_is_given_back(step: Step, nvme: str, at_step: AtStep) -> None:
    host.bind([nvme], on_step=at_step.hook)
    at_step(step, lambda: unplug(nvme))
    try:
        with pytest.raises(NoSuchDevice, match=f"there is no PCI device {nvme} any more"):
            host.unbind([nvme], on_step=at_step.hook)
        assert [(result.bdf, result.outcome) for result in host.restore()] == [(nvme, "gone")]
        assert host.restore() == []
    finally:
        (PCI / "rescan").write_text("1")
    namespace(nvme)


@pytest.mark.parametrize("step", [Step.OVERRIDE, Step.UNBIND, Step.PROBE])
def test_it_comes_back_anew_while_it_is_bound(step: Step, nvme: str, state: Path, at_step: AtStep) -> None:
    at_step(step, lambda: replug(nvme))
    with suppress(NotAssignable):  # it had its own driver again
        host.bind([nvme], on_step=at_step.hook)
    assert list(files(state)) == ([f"bound/{nvme}.json"] if driver(nvme) == "vfio-pci" else [])
    finish(nvme)


def test_it_comes_back_anew_while_it_is_restored(nvme: str, at_step: AtStep) -> None:
    at_step(Step.PROBE, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert Child(lambda: host.bind([nvme], on_step=at_step.hook)).wait() == -signal.SIGKILL
    at_step(Step.RETURN_PROBE, lambda: replug(nvme))
    assert [result.outcome for result in host.restore(on_step=at_step.hook)] == ["restored"]
    assert host.restore() == []
    namespace(nvme)


@pytest.mark.parametrize("step", BINDING)
def test_its_driver_takes_it_again(step: Step, nvme: str, at_step: AtStep) -> None:
    at_step(step, lambda: set_driver(nvme, "nvme"))
    try:
        host.bind([nvme], on_step=at_step.hook)
    except (KvmpassError, OSError) as error:
        assert nvme in str(error)
    finish(nvme)


@pytest.mark.parametrize("step", UNBINDING[1:4])
def test_vfio_pci_takes_it_again(step: Step, nvme: str, state: Path, at_step: AtStep) -> None:
    host.bind([nvme], on_step=at_step.hook)
    before = facts(), files(state)
    at_step(step, lambda: set_driver(nvme, "vfio-pci"))
    try:
        host.unbind([nvme], on_step=at_step.hook)
    except (KvmpassError, OSError) as error:
        assert nvme in str(error)
        assert (facts(), files(state)) == before
    finish(nvme)


@pytest.mark.parametrize("step", [Step.RETURN_PREPARE, Step.RETURN_PROBE])
def test_its_driver_takes_it_while_it_is_restored(step: Step, nvme: str, at_step: AtStep) -> None:
    at_step(Step.BOUND, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert Child(lambda: host.bind([nvme], on_step=at_step.hook)).wait() == -signal.SIGKILL
    at_step(step, lambda: set_driver(nvme, "nvme"))
    host.restore(on_step=at_step.hook)
    host.restore(on_step=at_step.hook)
    assert host.restore() == []
    namespace(nvme)


# --- many at once


def test_five_at_once(nvme: str, nvme2: str, edu: str, edu2: str, tmp_path: Path) -> None:
    """On overlapping devices: one after the other, none of them stuck, each refusal with the winner's name."""
    devices = [nvme, nvme2, edu, edu2]
    ends = time.monotonic() + SECONDS

    def work(number: int) -> None:
        chance = random.Random(number)
        told: list[str] = []
        counts = {"bind": 0, "unbind": 0, "assign": 0, "refused": 0}
        while time.monotonic() < ends:
            operation = chance.choice(["bind", "unbind", "assign"])
            chosen = chance.sample(devices, chance.randint(1, 3))
            try:
                if operation == "assign":
                    with host.borrow(*chosen, say=told.append) as taken:
                        assert all(device.driver == "vfio-pci" for device in taken)
                        time.sleep(chance.uniform(0, 0.2))
                        assert all(driver(bdf) == "vfio-pci" for bdf in chosen)
                else:
                    run(operation, *chosen, say=told.append)
                counts[operation] += 1
            except DeviceInUse as refusal:
                # Another one's borrowing, or its node; never this process, which has released everything.
                found = [int(pid) for pid in re.findall(r"process (\d+) \(", str(refusal))]
                assert found and os.getpid() not in found, str(refusal)
                counts["refused"] += 1
        assert all(re.search(r"waiting for process \d+ \(.+\), which changes drivers", line) for line in told), told
        (tmp_path / f"counts{number}").write_text(f"{counts} waited {len(told)}\n")

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            (tmp_path / f"error{number}").write_text(f"{error!r} {getattr(error, '__notes__', '')}")
            raise

    children = [Child(lambda number=number: guarded(number)) for number in range(5)]  # type: ignore[misc]
    statuses = [child.wait() for child in children]
    errors = [path.read_text() for path in sorted(tmp_path.glob("error*"))]
    assert not errors, "\n".join(errors)
    assert statuses == [0] * 5
    print(*(path.read_text() for path in sorted(tmp_path.glob("counts*"))), sep="")
    assert host.restore() == []
    host.unbind(devices)
    for drive in (nvme, nvme2):
        namespace(drive)


def test_three_commands_at_once(nvme: str) -> None:
    words = [sys.executable, "-m", "kvmpass", "bind", nvme]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=90)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sorted(outputs) == [*[f"{nvme}  already on vfio-pci\n"] * 2, f"{nvme}  nvme -> vfio-pci\n"]
    finish(nvme)
