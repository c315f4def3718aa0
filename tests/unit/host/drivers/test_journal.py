"""What binding leaves on disk, and the lock: entries and records that are broken, old or surplus."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.at_step import AtStep
from support.bind_stage import (
    EDU,
    NVME,
    Stage,
)

from kvmpass.errors import JournalError
from kvmpass.host import bind, restore
from kvmpass.host.drivers.changes import Step
from kvmpass.host.drivers.journal import Journal
from kvmpass.host.drivers.lock import HostLock
from kvmpass.host.drivers.restore import Restored

# --- journal and records


def left_by_a_killed_process(one: Stage, at_step: AtStep, step: Step) -> Path:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        one.run()
        os._exit(9)
    os.waitpid(child, 0)
    at_step(step, lambda: None)
    return one.state / "journal" / f"{NVME}.json"


@pytest.mark.parametrize("place", ["journal", "bound"])
@pytest.mark.parametrize("text", ["", '{"sch', "\xff", "[]", '{"schema": 1}'])
def test_a_broken_entry_is_put_aside_and_the_rest_restored(
    made: Callable[[str], Stage], place: str, text: str, at_step: AtStep
) -> None:
    one = made("bind")
    before = one.host.state(NVME)
    left_by_a_killed_process(one, at_step, Step.PROBE)
    broken = one.state / place / f"{EDU}.json"
    broken.write_bytes(text.encode("latin1"))
    assert sorted(one.restore()) == [(EDU, "corrupt"), (NVME, "restored")]
    assert one.host.state(NVME) == before
    assert broken.with_suffix(".corrupt").exists()
    assert one.restore() == []


@pytest.mark.parametrize("left", [b"", b"\0" * 300])
@pytest.mark.parametrize("place", ["journal", "bound"])
@pytest.mark.parametrize("reader", ["bind", "unbind", "restore"])
def test_what_a_power_failure_leaves_of_an_entry_is_no_obstacle(
    made: Callable[[str], Stage], reader: str, place: str, left: bytes
) -> None:
    """Nothing is synced; bindings do not survive a power failure either."""
    one = made("unbind" if reader == "unbind" else "bind")
    for directory in ("journal", "bound"):
        (one.state / directory).mkdir(parents=True, exist_ok=True)
    file = one.state / place / f"{NVME}.json"
    file.write_bytes(left)
    os.utime(file, (0, 0))
    if reader == "restore":
        assert restore(one.host, one.state) == [
            Restored(
                NVME,
                "stale",
                "emptied when another boot ended: nothing to do",
                "bound" if place == "bound" else None,
            )
        ]
    else:
        assert [(result.outcome, result.after) for result in one.run()] == [
            ("changed", "vfio-pci" if reader == "bind" else "nvme")
        ]
    assert one.restore() == []
    assert list((one.state / "journal").iterdir()) == []
    assert [path.name for path in (one.state / "bound").iterdir()] == ([file.name] if reader == "bind" else [])


@pytest.mark.parametrize("place", ["journal", "bound"])
def test_an_entry_of_this_boot_without_text_is_an_obstacle(made: Callable[[str], Stage], place: str) -> None:
    one = made("unbind")
    (one.state / place / f"{NVME}.json").write_bytes(b"")
    with pytest.raises(JournalError, match="cannot be read"):
        one.run()
    assert (NVME, "corrupt") in one.restore()


def test_no_change_waits_for_the_disk(made: Callable[[str], Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry is read from the page cache, by processes of the same boot."""
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("synced"))
    one = made("bind")
    assert [result.outcome for result in one.run()] == ["changed"]
    assert [result.outcome for result in one.unbind(NVME)] == ["changed"]


def test_a_broken_record_keeps_a_device_from_being_given_back_wrongly(made: Callable[[str], Stage]) -> None:
    one = made("unbind")
    (one.state / "bound" / f"{NVME}.json").write_text("{")
    one.refused(JournalError, "record of the bound device .* cannot be read", NVME, of="unbind")
    assert one.restore() == [(NVME, "corrupt")]
    assert one.unbind(NVME)[0].after == "nvme"


def test_half_written(one: Stage) -> None:
    for place in ("journal", "bound"):
        (one.state / place).mkdir(parents=True)
        (one.state / place / f"{NVME}.tmp").write_text('{"sch')
    assert one.restore() == []
    assert list(one.state.glob("*/*")) == []


@pytest.mark.parametrize("operation", ["bind", "unbind"])
def test_of_another_boot(made: Callable[[str], Stage], operation: str, at_step: AtStep) -> None:
    """Never replayed: on this boot the device has the driver that the kernel gave it."""
    one = made(operation)
    left_by_a_killed_process(one, at_step, Step.RETURN_UNBIND if operation == "unbind" else Step.UNBIND)
    one.host.put("proc/sys/kernel/random/boot_id", "another")
    now = one.host.state(NVME)
    one.host.writes.clear()
    expected = [(NVME, "stale")] * (2 if operation == "unbind" else 1)
    assert one.restore() == expected
    assert one.host.writes == []
    assert one.host.state(NVME) == now
    assert one.restore() == []


def test_a_record_of_another_boot_is_not_used(made: Callable[[str], Stage]) -> None:
    one = made("unbind")
    one.host.put("proc/sys/kernel/random/boot_id", "another")
    one.host.natural[NVME] = "e1000e"
    assert one.unbind(NVME)[0].after == "e1000e"


def test_a_record_of_a_device_that_is_not_bound_any_more(made: Callable[[str], Stage]) -> None:
    one = made("unbind")
    one.host.write(one.host.path("sys/bus/pci/drivers/vfio-pci/unbind"), NVME)
    assert one.restore() == []
    assert list((one.state / "bound").iterdir()) == []


def test_an_unbind_that_was_all_but_done_is_not_undone_under_a_mounted_drive(
    made: Callable[[str], Stage], at_step: AtStep
) -> None:
    one = made("unbind")
    left_by_a_killed_process(one, at_step, Step.RETURN_OVERRIDE)
    assert one.host.state(NVME) == ("nvme", "nvme")
    one.host.add_below(NVME, "sys/class/block", "nvme0n1", dev="259:0")
    one.host.put("proc/self/mountinfo", "1 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw")
    [result] = restore(one.host, one.state)
    assert (result.outcome, result.operation) == ("restored", "unbind")
    assert "/dev/nvme0n1 is mounted at /data" in result.detail
    assert one.host.state(NVME) == ("nvme", None)
    assert one.restore() == []


def test_the_owner_of_an_unfinished_bind_may_live(one: Stage) -> None:
    """A library's process goes on after a failure that could not be undone: its entry is nobody's."""
    one.host.process(4711, "daemon")
    one.bind(NVME)
    text = (one.state / "bound" / f"{NVME}.json").read_text().replace(f'"pid": {os.getpid()}', '"pid": 4711')
    entry = json.loads(text) | {"start_time": 777}
    (one.state / "journal" / f"{NVME}.json").write_text(json.dumps(entry))
    assert one.restore() == [(NVME, "restored")]
    assert one.host.state(NVME) == ("nvme", None)


# What an older version wrote, byte for byte: devices are bound before an upgrade and given back after it.
OLD_RECORD = """{
 "schema": 1,
 "bdf": "0000:01:00.0",
 "boot_id": "11111111-2222-3333-4444-555555555555",
 "pid": 999999,
 "start_time": 1331032,
 "command": "kvmpass",
 "driver": "nvme",
 "override": null,
 "power_control": "auto",
 "d3cold_allowed": "1",
 "step": "bound",
 "operation": "bind",
 "target": "vfio-pci",
 "target_override": "vfio-pci",
 "ids": "1022:1234:0000:0000"
}
"""
OLD_UNBIND = """{
 "schema": 1,
 "bdf": "0000:01:00.0",
 "boot_id": "11111111-2222-3333-4444-555555555555",
 "pid": 999999,
 "start_time": 1331032,
 "command": "kvmpass",
 "driver": "vfio-pci",
 "override": "vfio-pci",
 "power_control": "on",
 "d3cold_allowed": "1",
 "step": "return-probe",
 "operation": "unbind",
 "target": "nvme",
 "target_override": null,
 "ids": "1022:1234:0000:0000"
}
"""
# Of a borrower, from before entries said for what they were written.
OLDEST = """{
 "schema": 1,
 "bdf": "0000:01:00.0",
 "boot_id": "11111111-2222-3333-4444-555555555555",
 "pid": 999999,
 "start_time": 1331032,
 "command": "kvmpass",
 "driver": "nvme",
 "override": null,
 "power_control": "auto",
 "d3cold_allowed": "1",
 "step": "unbind"
}
"""


def old(made: Callable[[str], Stage], place: str, text: str) -> Stage:
    """The device is bound, and of all files there is only that one."""
    one = made("unbind")
    (one.state / "bound" / f"{NVME}.json").unlink()
    (one.state / place / f"{NVME}.json").write_text(text)
    return one


def test_a_device_that_an_older_version_has_bound(made: Callable[[str], Stage]) -> None:
    one = old(made, "bound", OLD_RECORD)
    assert one.restore() == []
    assert [(result.outcome, result.after) for result in one.unbind(NVME)] == [("changed", "nvme")]
    assert one.snapshot()[NVME] == ("nvme", None, "auto", "1")
    assert list(one.state.glob("*/*")) == []


@pytest.mark.parametrize(
    ("text", "after"),
    [
        (OLD_RECORD, ("nvme", None, "auto", "1")),
        (OLD_UNBIND, ("vfio-pci", "vfio-pci", "on", "1")),
        (OLDEST, ("nvme", None, "auto", "1")),
    ],
)
@pytest.mark.parametrize("driver", ["vfio-pci", "nvme", None])
def test_what_an_older_version_left_when_it_was_killed(
    made: Callable[[str], Stage], text: str, after: tuple[str, ...], driver: str | None
) -> None:
    """Wherever it was: on the first driver, on the second, or on none."""
    one = old(made, "journal", text)
    one.host.write(one.host.path("sys/bus/pci/drivers/vfio-pci/unbind"), NVME)
    if driver is not None:
        one.host._bind(NVME, driver)
    assert one.restore() == [(NVME, "restored")]
    assert one.snapshot()[NVME] == after
    assert list(one.state.glob("*/*")) == []


# --- the lock


def test_the_lock_names_its_holder(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpass.host.drivers.lock.PATIENCE", 0.05)
    monkeypatch.setattr("kvmpass.host.drivers.lock.LOCK_TIMEOUT", 0.3)
    said: list[str] = []
    script = f"""
import sys, time
sys.argv = ["/usr/bin/kvmpass", "bind", "{NVME}"]
from pathlib import Path
from kvmpass.host.drivers.journal import Journal
from kvmpass.host.drivers.lock import HostLock
from kvmpass.host.drivers.restore import Restored
with HostLock(Path({str(one.state / "lock")!r})).hold():
    print(flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            name = rf"process {holder.pid} \(kvmpass bind {NVME}\)"
            with pytest.raises(JournalError, match=f"{name} has been changing drivers for 0.3 s"):
                bind([NVME], sysfs=one.host, state_dir=one.state, say=said.append)
        finally:
            holder.kill()
    assert said == [f"waiting for process {holder.pid} (kvmpass bind {NVME}), which changes drivers"]
    one.bind(NVME)


def test_the_lock_is_taken_once_by_the_same_object(tmp_path: Path) -> None:
    lock = HostLock(tmp_path / "lock")
    other = HostLock(tmp_path / "lock")
    with lock.hold():
        with lock.hold():
            pass
        started = time.monotonic()
        with pytest.raises(JournalError), other.hold(timeout=0.05):
            pytest.fail("it is taken")
        assert time.monotonic() - started < 5
    with other.hold(timeout=0):
        pass


def test_a_relative_directory_stays_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has borrowed a device may change its working directory before it rebinds the device."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVMPASS_STATE_DIR", "state")
    journal = Journal()
    monkeypatch.chdir("/")
    assert [journal.state_dir, journal.directory] == [tmp_path / "state", tmp_path / "state/journal"]
