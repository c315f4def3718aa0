"""Borrowing and restoring against a made-up kernel: every way out, a failure and a kill at every step."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.at_step import AtStep
from support.host_tree import Host

from kvmpass.assignment.assign import assigned
from kvmpass.assignment.plan import plan
from kvmpass.errors import BadAddress, DeviceInUse, HostNotReady, JournalError, NotAssignable, RestoreFailed
from kvmpass.guest import GuestSpec
from kvmpass.host import Bdf, Look, bind, borrow, restore, unbind
from kvmpass.host.drivers import transaction
from kvmpass.host.drivers.changes import Step
from kvmpass.host.drivers.journal import Journal
from kvmpass.host.drivers.lock import HostLock
from kvmpass.host.drivers.transaction import Transaction

NVME, EDU, NIC = "0000:01:00.0", "0000:00:04.0", "0000:02:00.0"
BEFORE: dict[str, tuple[str | None, str | None]] = {
    NVME: ("nvme", None),
    EDU: (None, None),
    NIC: ("e1000e", "e1000e"),
}
TAKING = [Step.RECORDED, Step.OVERRIDE, Step.UNBIND, Step.PROBE, Step.BOUND]
RETURNING = [
    Step.RETURN_PREPARE,
    Step.RETURN_UNBIND,
    Step.RETURN_PROBE,
    Step.RETURN_OVERRIDE,
    Step.RETURN_POWER,
    Step.RETURNED,
]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(transaction, "NODE_TIMEOUT", 0.02)
    host = Host(tmp_path / "host")
    host.add(NVME, "nvme", 7, power__control="auto")
    host.add(EDU, None, 5)
    host.add(NIC, "e1000e", 9, driver_override="e1000e")
    return host


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def as_before(host: Host, state: Path) -> bool:
    left = [path.name for path in (state / "journal").glob("*")] if state.exists() else []
    return not left and {bdf: host.state(bdf) for bdf in BEFORE} == BEFORE


def assign(*bdfs: str) -> object:
    return assigned(bdfs, GuestSpec()).__enter__()


def in_child(action: Callable[[], object]) -> int:
    """The wait status of a child process that does it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(9)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("bdf", BEFORE)
def test_there_and_back(host: Host, state: Path, bdf: str) -> None:
    siblings = {other: host.state(other) for other in BEFORE if other != bdf}
    with borrow(bdf, sysfs=host, state_dir=state) as [device]:
        assert (device.driver, device.driver_override) == ("vfio-pci", "vfio-pci")
        assert {other: host.state(other) for other in siblings} == siblings
        entry = json.loads((state / "journal" / f"{bdf}.json").read_text())
        assert (entry["driver"], entry["override"]) == BEFORE[bdf]
        assert entry["pid"] == os.getpid()
    assert as_before(host, state)
    assert not any("new_id" in place for place, _ in host.writes)


def test_runtime_power_management_is_put_back(host: Host, state: Path) -> None:
    with borrow(NVME, sysfs=host, state_dir=state):
        assert host.text("sys/bus/pci/devices", NVME, "power/control") == "on"
    assert host.text("sys/bus/pci/devices", NVME, "power/control") == "auto"


def test_the_journal_is_written_before_each_change(host: Host, state: Path) -> None:
    seen: list[tuple[Step, str, int]] = []

    def hook(step: Step, bdf: Bdf) -> None:
        seen.append((step, json.loads((state / "journal" / f"{bdf}.json").read_text())["step"], len(host.writes)))

    with borrow(NVME, sysfs=host, state_dir=state, on_step=hook):
        pass
    assert [step for step, _, _ in seen] == TAKING + RETURNING
    assert all(step == written for step, written, _ in seen)
    assert seen[0][2] == 0
    assert seen[1][2] == 0


def test_a_device_on_vfio_pci_stays_there(host: Host, state: Path) -> None:
    host.add("0000:03:00.0", "vfio-pci", 11)
    with borrow("03:00.0", sysfs=host, state_dir=state) as [device]:
        assert device.driver == "vfio-pci"
    assert host.state("0000:03:00.0") == ("vfio-pci", None)
    assert host.writes == []


@pytest.mark.parametrize("bdf", BEFORE)
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", TAKING)
def test_a_failure_while_taking(
    host: Host,
    state: Path,
    bdf: str,
    kind: type[BaseException],
    step: Step,
) -> None:
    reached = []

    def hook(now: Step, where: Bdf) -> None:
        if now == step:
            reached.append(now)
            raise kind

    if bdf == EDU and step == Step.UNBIND:  # it has no driver to unbind
        return
    with pytest.raises(kind), borrow(bdf, sysfs=host, state_dir=state, on_step=hook):
        pytest.fail("the block must not run")
    assert reached == [step]
    assert as_before(host, state)


@pytest.mark.parametrize("step", RETURNING)
def test_a_failure_while_giving_back_is_tried_again(host: Host, state: Path, step: Step, at_step: AtStep) -> None:
    failures: Iterator[None] = iter([None])

    def fail() -> None:
        for _ in failures:
            raise OSError("once")

    with borrow(NVME, NIC, sysfs=host, state_dir=state, on_step=at_step.hook):
        at_step(step, fail)
    assert next(failures, "used") == "used"
    assert as_before(host, state)


def test_one_that_cannot_be_given_back_does_not_keep_the_others(host: Host, state: Path) -> None:
    with pytest.raises(RestoreFailed, match=NVME) as caught, borrow(NVME, NIC, EDU, sysfs=host, state_dir=state):
        host.refuses.add("nvme")
    assert NIC not in str(caught.value)
    assert (host.state(NIC), host.state(EDU)) == (BEFORE[NIC], BEFORE[EDU])
    assert host.state(NVME)[0] is None
    host.refuses.clear()
    host.process(os.getpid(), "pytest")  # another start time: the owner has died
    assert [(result.bdf, result.outcome) for result in restore(host, state)] == [(NVME, "restored")]
    assert as_before(host, state)


def test_an_error_in_the_block_keeps_its_place(host: Host, state: Path) -> None:
    borrowed = borrow(NVME, sysfs=host, state_dir=state)
    with pytest.raises(ValueError, match="mine") as caught, borrowed:
        host.refuses.add("nvme")
        raise ValueError("mine")
    assert any("cannot restore" in note for note in caught.value.__notes__)
    host.refuses.clear()
    borrowed.close()
    assert as_before(host, state)


def test_all_or_none(host: Host, state: Path) -> None:
    taken: list[str] = []
    original = host.write

    def write(path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
        if path.name == "unbind" and text.strip() == NIC and NIC not in taken:
            taken.append(NIC)
            raise OSError("refused")
        original(path, text, timeout, held)

    host.write = write  # type: ignore[method-assign]
    with pytest.raises(OSError, match="refused"), borrow(NVME, NIC, sysfs=host, state_dir=state):
        pytest.fail("the block must not run")
    assert as_before(host, state)


def test_several_devices_change_at_the_same_time(host: Host, state: Path) -> None:
    """A drive that takes long to shut down delays no other; each has its entry before its own change."""
    together = threading.Barrier(2, timeout=10)
    seen: list[str] = []

    def hook(step: Step, bdf: Bdf) -> None:
        if step in (Step.UNBIND, Step.RETURN_PROBE):
            assert json.loads((state / "journal" / f"{bdf}.json").read_text())["step"] == step
            together.wait()
            seen.append(f"{step} {bdf}")

    with borrow(NVME, NIC, sysfs=host, state_dir=state, on_step=hook) as devices:
        assert [str(device.bdf) for device in devices] == [NVME, NIC]
    assert sorted(seen) == sorted(f"{step} {bdf}" for step in (Step.UNBIND, Step.RETURN_PROBE) for bdf in (NVME, NIC))
    assert as_before(host, state)


@pytest.mark.parametrize("step", [Step.UNBIND, Step.PROBE, Step.RETURN_UNBIND, Step.RETURN_PROBE])
def test_killed_while_several_devices_change(host: Host, state: Path, step: Step) -> None:
    together = threading.Barrier(2, timeout=10)

    def hook(now: Step, _: Bdf) -> None:
        if now == step:
            together.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        host.process(os.getpid(), "kvmpass", Path("/proc/self/stat").read_text())
        with borrow(NVME, NIC, sysfs=host, state_dir=state, on_step=hook):
            pass

    assert in_child(child) == signal.SIGKILL
    for name in host.names("proc"):
        if name.isdecimal() and int(name) != os.getpid():
            host.path("proc", name, "stat").unlink()
    results = [(result.bdf, result.outcome) for result in restore(host, state)]
    assert results == [(NVME, "restored"), (NIC, "restored")]
    assert as_before(host, state)


@pytest.mark.parametrize("stolen", [False, True], ids=["ours", "by another process"])
def test_an_interrupted_return_takes_no_device_from_a_later_borrow(host: Host, state: Path, stolen: bool) -> None:
    """Neither from one of this process nor from that of another, whose entry is in the journal by then."""

    def interrupt(step: Step, bdf: Bdf) -> None:
        if step is Step.RETURN_UNBIND and bdf == Bdf.parse(NIC):
            raise KeyboardInterrupt

    first = borrow(NVME, NIC, sysfs=host, state_dir=state, on_step=interrupt)
    first.__enter__()
    with pytest.raises(KeyboardInterrupt):
        first.close()
    assert [str(entry.bdf) for entry in first._transaction.entries] == [NIC]
    assert host.state(NVME) == BEFORE[NVME]
    if stolen:
        entry = json.loads((state / "journal" / f"{NIC}.json").read_text()) | {"pid": 1, "start_time": 5}
        (state / "journal" / f"{NIC}.json").write_text(json.dumps(entry))
        first._transaction._on_step = None
        first.close()
        assert host.state(NIC)[0] == "vfio-pci"
        return
    with borrow(NVME, sysfs=host, state_dir=state):
        first._transaction._on_step = None
        first.close()
        assert host.state(NVME)[0] == "vfio-pci"
        assert (state / "journal" / f"{NVME}.json").exists()
    assert as_before(host, state)


def test_a_later_borrow_of_this_process_is_the_only_one_that_restores(host: Host, state: Path) -> None:
    """Even if the first has an entry in memory that is no longer, or was never, in the journal."""
    first = borrow(NVME, sysfs=host, state_dir=state)
    first.__enter__()
    [entry] = first._transaction.entries
    first.close()
    first._transaction.entries.append(entry)
    transaction._open.add(first._transaction)
    with borrow(NVME, sysfs=host, state_dir=state):
        first.close()
        assert host.state(NVME)[0] == "vfio-pci"
    assert as_before(host, state)


def test_each_state_directory_has_its_own_borrows(host: Host, state: Path, tmp_path: Path) -> None:
    first = borrow(NVME, sysfs=host, state_dir=state)
    first.__enter__()
    with borrow(NVME, sysfs=host, state_dir=tmp_path / "other") as [device]:
        assert device.driver == "vfio-pci"
    assert host.state(NVME)[0] == "vfio-pci"
    first.close()
    assert as_before(host, state)


def test_a_process_without_a_start_time_gets_its_devices_back(
    host: Host, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc is not readable."""
    monkeypatch.setattr("kvmpass.host.drivers.journal.start_time", lambda sysfs, pid: None)
    with borrow(NVME, sysfs=host, state_dir=state):
        assert host.state(NVME)[0] == "vfio-pci"
    assert as_before(host, state)


def test_vfio_pci_refuses(host: Host, state: Path) -> None:
    host.refuses.add("vfio-pci")
    with pytest.raises(NotAssignable, match="does not bind"), borrow(NVME, sysfs=host, state_dir=state):
        pytest.fail("the block must not run")
    assert as_before(host, state)


def test_no_node_appears(host: Host, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.path("dev/vfio").rename(host.path("dev/elsewhere"))
    host.put("dev/vfio", "not a directory")
    monkeypatch.setattr(host, "put", lambda *_: None)
    with pytest.raises(HostNotReady, match="does not exist"), borrow(NVME, sysfs=host, state_dir=state):
        pytest.fail("the block must not run")
    assert as_before(host, state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", TAKING + RETURNING)
@pytest.mark.usefixtures("usual_signals")
def test_signals_wait_and_are_not_lost(
    host: Host, state: Path, step: Step, number: signal.Signals, at_step: AtStep
) -> None:
    """Twice: an impatient user presses Ctrl-C again while the device is being given back."""

    def send() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        at_step(step, send)
        with pytest.raises(KeyboardInterrupt), borrow(NVME, sysfs=host, state_dir=state, on_step=at_step.hook):
            assert step in RETURNING
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, before)
    assert as_before(host, state)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.usefixtures("usual_signals")
def test_a_signal_interrupts_the_checks(
    host: Host, state: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Those before the lock, and those under it, with which a caller that has checked the devices begins."""
    checked: list[Bdf] = []

    def check(sysfs: object, bdf: Bdf, **_: object) -> None:
        checked.append(bdf)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("kvmpass.host.drivers.borrow.check_assignable", check)
    with pytest.raises(KeyboardInterrupt):
        borrow(NVME, NIC, sysfs=host, state_dir=state, look=None if before else Look(host)).__enter__()
    assert checked == [Bdf.parse(NVME)]
    assert (state / "lock").exists() is not before
    assert host.writes == []


def test_from_another_thread(host: Host, state: Path) -> None:
    results: list[str | None] = []

    def work() -> None:
        with borrow(NVME, sysfs=host, state_dir=state) as [device]:
            results.append(device.driver)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert results == ["vfio-pci"]
    assert as_before(host, state)


@pytest.mark.parametrize("step", TAKING + RETURNING)
def test_killed(host: Host, state: Path, step: Step, at_step: AtStep) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def child() -> None:
        host.process(os.getpid(), "kvmpass", Path("/proc/self/stat").read_text())
        with borrow(NVME, sysfs=host, state_dir=state, on_step=at_step.hook):
            pass

    assert in_child(child) == signal.SIGKILL
    at_step(step, lambda: None)
    for name in host.names("proc"):
        if name.isdecimal() and int(name) != os.getpid():
            host.path("proc", name, "stat").unlink()
    assert [(result.bdf, result.outcome) for result in restore(host, state, on_step=at_step.hook)] == [
        (NVME, "restored")
    ]
    assert as_before(host, state)
    assert restore(host, state) == []


def test_what_a_killed_process_left_is_no_obstacle(host: Host, state: Path) -> None:
    with borrow(NVME, sysfs=host, state_dir=state):
        text = (state / "journal" / f"{NVME}.json").read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999')
        kept = host.state(NVME)
    host.write(host.path("sys/bus/pci/drivers/nvme/unbind"), NVME)
    host.write(host.path("sys/bus/pci/devices", NVME, "driver_override"), "vfio-pci\n")
    host.write(host.path("sys/bus/pci/drivers_probe"), NVME)
    (state / "journal" / f"{NVME}.json").write_text(text)
    assert host.state(NVME) == kept
    with borrow(NVME, sysfs=host, state_dir=state):
        assert json.loads((state / "journal" / f"{NVME}.json").read_text())["driver"] == "nvme"
    assert as_before(host, state)


@pytest.mark.parametrize("by", ["restore", "borrow"])
def test_what_a_killed_process_left_is_rebound_at_the_same_time(host: Host, state: Path, by: str) -> None:
    """A driver that takes long delays no other device."""

    def child() -> None:
        host.process(os.getpid(), "kvmpass", Path("/proc/self/stat").read_text())
        with borrow(NVME, NIC, sysfs=host, state_dir=state):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == signal.SIGKILL
    for name in host.names("proc"):
        if name.isdecimal() and int(name) != os.getpid():
            host.path("proc", name, "stat").unlink()
    together = threading.Barrier(2, timeout=10)

    def hook(step: Step, _: Bdf) -> None:
        if step == Step.RETURN_PROBE:
            together.wait()

    if by == "restore":
        results = restore(host, state, on_step=hook)
        assert [(result.bdf, result.outcome) for result in results] == [(NVME, "restored"), (NIC, "restored")]
    else:
        with borrow(NVME, NIC, sysfs=host, state_dir=state, on_step=hook):
            pass
    assert as_before(host, state)


def test_none_is_rebound_if_one_is_borrowed(host: Host, state: Path) -> None:
    with borrow(NVME, NIC, sysfs=host, state_dir=state):
        file = state / "journal" / f"{NVME}.json"
        text = file.read_text()
        file.write_text(text.replace(f'"pid": {os.getpid()}', '"pid": 999999'))
        host.writes.clear()
        with pytest.raises(DeviceInUse, match=f"{NIC} is assigned by"):
            Transaction(host, Journal(state)).recover([Bdf.parse(NVME), Bdf.parse(NIC)])
        assert host.writes == []
        file.write_text(text)
    assert as_before(host, state)


def test_what_cannot_be_assigned_waits_for_no_lock_and_restores_nothing(
    host: Host, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpass.host.drivers.lock.LOCK_TIMEOUT", 0.1)
    host.add("0000:03:00.0", "e1000e", group=None)
    with borrow(NVME, sysfs=host, state_dir=state):
        file = state / "journal" / f"{NVME}.json"
        text = file.read_text()
        file.write_text(text.replace(f'"pid": {os.getpid()}', '"pid": 999999'))
        host.writes.clear()
        for lock in (HostLock(state / "lock").hold(), nullcontext()):
            with lock, pytest.raises(NotAssignable, match="03:00"):
                borrow(NVME, "03:00.0", sysfs=host, state_dir=state).__enter__()
        assert host.writes == []
        file.write_text(text)
    assert as_before(host, state)


def test_a_living_owner_is_left_alone(host: Host, state: Path) -> None:
    with borrow(NVME, sysfs=host, state_dir=state):
        assert [result.outcome for result in restore(host, state)] == ["owner-alive"]
        with pytest.raises(DeviceInUse, match=rf"process {os.getpid()} \(pytest\)"):
            borrow(NVME, sysfs=host, state_dir=state).__enter__()
        assert host.state(NVME)[0] == "vfio-pci"
    assert as_before(host, state)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"boot_id": "another"}, "stale"),
        ({"pid": 999999}, "restored"),
        ({"start_time": 1}, "restored"),
        ({"schema": 2}, "corrupt"),
        ({"driver": 7}, "corrupt"),
        ({"bdf": NIC}, "corrupt"),
        ({"step": "unheard-of"}, "corrupt"),
        ({"extra": 1}, "corrupt"),
    ],
)
def test_entries(host: Host, state: Path, change: dict[str, object], outcome: str) -> None:
    file = state / "journal" / f"{NVME}.json"
    with borrow(NVME, sysfs=host, state_dir=state):
        content = json.loads(file.read_text())
    file.write_text(json.dumps(content | change))
    host.writes.clear()
    with_nothing_to_do = restore(host, state)
    assert [(result.bdf, result.outcome) for result in with_nothing_to_do] == [(NVME, outcome)]
    assert host.writes == []
    assert restore(host, state) == []


def test_a_half_written_entry_does_not_stop_the_rest(host: Host, state: Path) -> None:
    with borrow(NVME, NIC, sysfs=host, state_dir=state):
        file = state / "journal" / f"{NVME}.json"
        content = file.read_text()
        file.write_text(content[:40])
        other = state / "journal" / f"{NIC}.json"
        other.write_text(other.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999'))
        assert [result.outcome for result in restore(host, state)] == ["corrupt", "restored"]
        assert host.state(NIC) == BEFORE[NIC]
        file.write_text("")
        with pytest.raises(JournalError, match="cannot be read"):
            borrow(NVME, sysfs=host, state_dir=state).__enter__()
    assert host.state(NVME) == BEFORE[NVME]


def test_killed_while_writing_the_journal(host: Host, state: Path) -> None:
    (state / "journal").mkdir(parents=True)
    (state / "journal" / f"{NVME}.tmp").write_text('{"sch')
    assert restore(host, state) == []
    assert as_before(host, state)


def test_a_device_that_has_gone(host: Host, state: Path) -> None:
    with borrow(NVME, sysfs=host, state_dir=state):
        text = (state / "journal" / f"{NVME}.json").read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999')
        host.remove(NVME)
    assert not list((state / "journal").glob("*"))
    (state / "journal" / f"{NVME}.json").write_text(text)
    assert [result.outcome for result in restore(host, state)] == ["gone"]


def test_bound_by_someone_else_meanwhile(host: Host, state: Path) -> None:
    host.add_driver("other")
    with borrow(NVME, sysfs=host, state_dir=state):
        host.write(host.path("sys/bus/pci/drivers/vfio-pci/unbind"), NVME)
        host.write(host.path("sys/bus/pci/drivers/other/bind"), NVME)
    assert host.state(NVME) == ("other", None)


def test_the_module_is_loaded_when_it_is_missing(host: Host, state: Path) -> None:
    driver = host.path("sys/bus/pci/drivers/vfio-pci")
    for file in driver.iterdir():
        file.unlink()
    driver.rmdir()
    with borrow(NVME, sysfs=host, state_dir=state) as [device]:
        assert device.driver == "vfio-pci"
    assert as_before(host, state)


@pytest.mark.parametrize("operation", [borrow, lambda *bdfs: bind(bdfs), lambda *bdfs: unbind(bdfs), assign])
def test_named_twice(host: Host, operation: Callable[[str, str], object]) -> None:
    """One error, with or without the domain, whatever is to be done; a plan has it beside the others."""
    with pytest.raises(BadAddress, match=f"{NVME} is named twice") as refused:
        operation("01:00.0", NVME)
    assert refused.value.__notes__ == ["name each device once"]
    blocks = plan(["01:00.0", NVME], sysfs=host).blockers
    assert (f"{NVME} is named twice", "name each device once") in [
        (blocker.cause, blocker.remedy) for blocker in blocks
    ]


@pytest.mark.parametrize("place", ["", "..", "journal", "bound"])
def test_a_file_in_the_place_of_a_directory_is_named(host: Host, tmp_path: Path, place: str) -> None:
    """The state directory itself, the one above it, one below: before anything changes."""
    state = tmp_path / "above/state"
    blocked = Path(os.path.normpath(state / place))
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("")
    for action in (lambda: borrow(NVME, sysfs=host, state_dir=state).__enter__(), lambda: restore(host, state)):
        with pytest.raises(NotADirectoryError) as refused:
            action()
        assert refused.value.filename == str(blocked)
        assert f"move {blocked} away, or set KVMPASS_STATE_DIR to another directory" in refused.value.__notes__[0]
    assert as_before(host, tmp_path / "state")


def test_a_device_open_in_this_process_is_not_unbound(host: Host, state: Path) -> None:
    borrowed = borrow(NVME, sysfs=host, state_dir=state)
    with pytest.raises(RestoreFailed, match="still open in process"), borrowed:
        host.process(os.getpid(), "pytest", Path("/proc/self/stat").read_text(), nodes=("/dev/vfio/7",))
    assert host.state(NVME)[0] == "vfio-pci"
    host.path("proc", str(os.getpid()), "fd", "0").unlink()
    borrowed.close()
    assert as_before(host, state)
