"""Binding and giving back against a made-up kernel: whatever happens at each step and at each write."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.at_step import AtStep
from support.bind_stage import (
    EDU,
    EVERY_STEP,
    NIC,
    NVME,
    Stage,
    raising,
)

from kvmpass.errors import DriverPinned, HostNotReady, KvmpassError, NoSuchDevice, NotAssignable, RestoreFailed
from kvmpass.host import Bdf
from kvmpass.host.drivers.changes import Step
from kvmpass.host.drivers.journal import Journal
from kvmpass.host.drivers.transaction import Transaction
from kvmpass.host.sysfs import PciDevice

# --- at each step


@pytest.mark.parametrize(("operation", "step"), EVERY_STEP)
def test_killed(made: Callable[[str], Stage], operation: str, step: Step, at_step: AtStep) -> None:
    stage = made(operation)
    before = stage.snapshot()
    reached = at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        try:
            stage.run()
        finally:
            os._exit(9)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert reached == []  # it was the child that got there
    at_step(step, lambda: None)
    assert stage.restore() == [(NVME, "restored")]
    after = stage.snapshot()
    assert after == before
    stage.host.writes.clear()
    assert stage.restore() == []
    assert stage.host.writes == []
    assert stage.snapshot() == after


@pytest.mark.parametrize(("operation", "step"), EVERY_STEP)
def test_killed_and_done_again(made: Callable[[str], Stage], operation: str, step: Step, at_step: AtStep) -> None:
    """Nobody needs to know of restore: the next command clears its way."""
    stage = made(operation)
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        stage.run()
        os._exit(9)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    at_step(step, lambda: None)
    assert [result.outcome for result in stage.run()] == ["changed"]
    assert stage.restore() == []
    assert stage.host.state(NVME)[0] == ("vfio-pci" if operation == "bind" else "nvme")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("operation", "step"), EVERY_STEP)
@pytest.mark.usefixtures("usual_signals")
def test_signals(
    made: Callable[[str], Stage], operation: str, step: Step, number: signal.Signals, at_step: AtStep
) -> None:
    stage = made(operation)
    before = stage.snapshot()

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, terminate)
    try:
        reached = at_step(step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            stage.run()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert reached == [step]
    assert stage.snapshot() == before


@pytest.mark.parametrize("kind", [RuntimeError, OSError, HostNotReady])
@pytest.mark.parametrize(("operation", "step"), EVERY_STEP)
def test_a_failure(
    made: Callable[[str], Stage], operation: str, step: Step, kind: type[Exception], at_step: AtStep
) -> None:
    stage = made(operation)
    before = stage.snapshot()
    reached = at_step(step, raising(kind("injected")))
    with pytest.raises(kind, match="injected") as caught:
        stage.run()
    assert reached == [step]
    assert f"as before again: {NVME}" in caught.value.__notes__
    assert stage.snapshot() == before


# --- at each write


Made = Callable[[str], Stage]


def writes(made: Made, operation: str) -> Iterator[Stage]:
    """A fresh host for each write of an operation; ``number`` is that write's."""
    rehearsal = made(operation)
    rehearsal.run()
    assert len(rehearsal.host.writes) >= 3
    for number, _ in enumerate(rehearsal.host.writes, 1):
        stage = made(operation)
        stage.number = number
        yield stage


@pytest.mark.parametrize("operation", ["bind", "unbind"])
def test_a_write_fails(made: Made, operation: str) -> None:
    """Everything is put back; or, where a driver takes the device all the same (``bind`` for probe), it is done."""
    for stage in writes(made, operation):
        before = stage.snapshot()
        stage.before_write(stage.number, raising(OSError(errno.EIO, "I/O error")))
        try:
            [result] = stage.run()
        except (OSError, KvmpassError) as error:
            assert f"as before again: {NVME}" in error.__notes__
            assert stage.snapshot() == before
        else:
            assert result.after == ("vfio-pci" if operation == "bind" else "nvme")
        assert stage.restore() == []


@pytest.mark.parametrize("operation", ["bind", "unbind"])
def test_from_one_write_on_all_fail(made: Made, operation: str) -> None:
    """What is left is said, with the remedy; the remedy works."""
    for stage in writes(made, operation):
        before = stage.snapshot()
        broken = True
        original = stage.host.write
        count = 0

        def write(path: Path, text: str, *more: Any) -> None:
            nonlocal count
            count += 1
            if broken and count >= stage.number:  # noqa: B023
                raise OSError(errno.EIO, "I/O error", str(path))
            original(path, text, *more)  # noqa: B023

        stage.host.write = write  # type: ignore[method-assign]
        with pytest.raises((OSError, KvmpassError)) as caught:
            stage.run()
        notes = " ".join(caught.value.__notes__)
        if f"as before again: {NVME}" not in notes:
            assert f"cannot restore {NVME}" in notes
            assert "kvmpass restore" in notes
            broken = False
            assert stage.restore() == [(NVME, "restored")]
        assert stage.snapshot() == before


@pytest.mark.parametrize("operation", ["bind", "unbind"])
def test_it_vanishes(made: Made, operation: str) -> None:
    for stage in writes(made, operation):
        stage.before_write(stage.number, lambda stage=stage: stage.host.remove(NVME))
        with pytest.raises(NoSuchDevice, match=f"no PCI device {NVME} any more") as caught:
            stage.run()
        assert not any("as before" in note for note in getattr(caught.value, "__notes__", []))
        assert list((stage.state / "journal").iterdir()) == []
        assert stage.restore() == ([(NVME, "gone")] if operation == "unbind" else [])
        assert stage.restore() == []


@pytest.mark.parametrize("operation", ["bind", "unbind"])
def test_it_vanishes_and_comes_back(made: Made, operation: str) -> None:
    """On the driver that matches, without override, as after a rescan."""
    for stage in writes(made, operation):

        def replug(stage: Stage = stage) -> None:
            stage.host.remove(NVME)
            stage.host.path("sys/kernel/iommu_groups/7/devices", NVME).unlink()
            stage.host.add(NVME, "nvme", 7, power__control="auto", d3cold_allowed="1")

        stage.before_write(stage.number, replug)
        try:
            stage.run()
        except (KvmpassError, OSError) as error:
            assert "\n" not in str(error)
        assert list((stage.state / "journal").iterdir()) == []
        assert stage.restore() == []
        assert stage.host.state(NVME) in [("nvme", None), ("vfio-pci", "vfio-pci")]


@pytest.mark.parametrize("operation", ["bind", "unbind"])
@pytest.mark.parametrize("driver", ["nvme", "vfio-pci", "other"])
def test_somebody_else_changes_its_driver(made: Made, operation: str, driver: str) -> None:
    """It ends as asked for, or with a clear error; nothing is left behind, and no driver is taken from them."""
    for stage in writes(made, operation):
        stage.host.add_driver("other")

        def grab(stage: Stage = stage) -> None:
            link = stage.host.path("sys/bus/pci/devices", NVME, "driver")
            link.unlink(missing_ok=True)
            stage.host._bind(NVME, driver)

        stage.before_write(stage.number, grab)
        try:
            [result] = stage.run()
        except (KvmpassError, OSError) as error:
            assert NVME in str(error) or any(NVME in note for note in error.__notes__)
        else:
            assert stage.host.state(NVME)[0] == result.after
        assert list((stage.state / "journal").iterdir()) == []
        now, override = stage.host.state(NVME)
        assert now in ("nvme", "vfio-pci", "other")
        if now == "nvme":
            assert override is None
        stage.restore()
        stage.host.writes.clear()
        assert stage.restore() == []
        assert stage.host.writes == []


@pytest.mark.parametrize("driver", ["nvme", "vfio-pci", "other", None])
@pytest.mark.parametrize(("operation", "step"), EVERY_STEP)
def test_success_is_never_said_of_a_device_that_went_elsewhere(
    made: Made, operation: str, step: Step, driver: str | None, at_step: AtStep
) -> None:
    stage = made(operation)
    stage.host.add_driver("other")

    def grab() -> None:
        stage.host.path("sys/bus/pci/devices", NVME, "driver").unlink(missing_ok=True)
        if driver is not None:
            stage.host._bind(NVME, driver)

    reached = at_step(step, grab)
    wanted = "vfio-pci" if operation == "bind" else "nvme"
    try:
        [result] = stage.run()
    except (KvmpassError, OSError) as error:
        assert NVME in str(error)
        assert list((stage.state / "journal").iterdir()) == []
    else:
        assert (result.after, stage.host.state(NVME)[0]) == (wanted, wanted)
    assert reached == [step]
    assert stage.restore() == []


def test_unbound_by_somebody_else_at_that_moment(one: Stage) -> None:
    """Between our look and our write: the kernel answers ENODEV, and the device is free all the same."""
    one.before_write(2, lambda: one.host.path("sys/bus/pci/devices", NVME, "driver").unlink())
    assert [result.outcome for result in one.bind(NVME)] == ["changed"]


# --- several


def test_all_or_none(one: Stage) -> None:
    before = one.snapshot()
    one.host.refuses.add("vfio-pci")
    original = one.host._bind

    def picky(bdf: str, driver: str) -> None:
        one.host.refuses = {"vfio-pci"} if bdf == NIC else set()
        original(bdf, driver)

    one.host._bind = picky  # type: ignore[method-assign]
    with pytest.raises(NotAssignable, match=f"vfio-pci does not bind {NIC}") as caught:
        one.bind(NVME, EDU, NIC)
    assert f"as before again: {NVME}, {EDU}, {NIC}" in caught.value.__notes__
    assert one.snapshot() == before
    one.bind(NVME, EDU)
    bound = one.snapshot()
    one.host.put("etc/driverctl.d/" + EDU, "vfio-pci")
    with pytest.raises(DriverPinned):
        one.unbind(NVME, EDU)
    assert one.snapshot() == bound


@pytest.mark.parametrize("step", [Step.RECORDED, Step.OVERRIDE])
def test_no_driver_is_unbound_once_a_device_has_failed(one: Stage, step: Step) -> None:
    """A network interface, for example, would lose its addresses for nothing."""
    before, failed = one.snapshot(), threading.Event()
    original = one.host.write

    def on_step(reached: Step, bdf: Bdf) -> None:
        if str(bdf) == NVME and reached is Step.OVERRIDE:
            raise OSError(errno.EIO, "refused at once")
        if str(bdf) == NIC and reached is step:
            failed.wait(10)

    def record(transaction: Transaction, *arguments: Any) -> PciDevice:
        try:
            return change(transaction, *arguments)
        finally:
            failed.set()

    def write(path: Path, text: str, *more: Any) -> None:
        assert path.name != "unbind", "its driver stays"
        original(path, text, *more)

    change = Transaction._change
    one.host.write, one.on_step = write, on_step  # type: ignore[method-assign, assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "_change", record)
        with pytest.raises(OSError, match="refused at once") as caught:
            one.bind(NIC, NVME)
    assert caught.value.__notes__[-1] == f"as before again: {NIC}, {NVME}"
    assert one.snapshot() == before


@pytest.mark.parametrize("operation", ["bind", "unbind"])
def test_all_or_none_when_the_last_one_cannot_be_completed(
    one: Stage, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a full or broken disk leave half of them: the first has its record by then, or has lost its entry."""
    if operation == "unbind":
        one.bind(NVME, NIC)
    before = one.snapshot()
    method = "keep" if operation == "bind" else "remove"
    original = getattr(Journal, method)
    failures = iter([False, True])

    def fail(journal: Journal, bdf: Bdf) -> None:
        if next(failures, False):
            raise OSError(errno.EIO, "I/O error")
        original(journal, bdf)

    monkeypatch.setattr(Journal, method, fail)
    with pytest.raises(OSError, match="I/O error") as caught:
        one.bind(NVME, NIC) if operation == "bind" else one.unbind(NVME, NIC)
    assert f"as before again: {NVME}, {NIC}" in caught.value.__notes__
    assert one.snapshot() == before
    assert one.restore() == []


def test_a_driver_that_does_not_take_it_back(made: Callable[[str], Stage]) -> None:
    one = made("unbind")
    before = one.snapshot()
    one.host.refuses.add("nvme")
    with pytest.raises(RestoreFailed, match=f"nvme does not bind {NVME}: it has no driver now"):
        one.run()
    assert one.snapshot() == before
