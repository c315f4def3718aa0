"""Full disks, others who hold a device, files that are no entries: every device still ends where it belongs."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.host_tree import Host

from kvmpass.errors import DeviceInUse, NotAssignable
from kvmpass.host import Bdf, bind, borrow, diagnose, restore, unbind
from kvmpass.host.blockers import blockers
from kvmpass.host.drivers import transaction
from kvmpass.host.drivers.changes import Step
from kvmpass.host.drivers.journal import Entry, Journal

NVME, MATE, NIC = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(transaction, "NODE_TIMEOUT", 0.02)
    host = Host(tmp_path / "host")
    host.add(NVME, "nvme", 7)
    host.add(MATE, "nvme", 7)
    host.add(NIC, "e1000e", 9)
    return host


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def left_by_another(host: Host, state: Path, bdf: str, **changes: Any) -> Path:
    """The journal entry of a borrower that was killed, its device on vfio-pci."""
    (state / "journal").mkdir(parents=True, exist_ok=True)
    content = json.loads(Entry.of(host, Bdf.parse(bdf)).to_json()) | {"pid": 99999, "start_time": 1} | changes
    path = state / "journal" / f"{bdf}.json"
    path.write_text(json.dumps(content))
    return path


def test_a_shared_group_that_another_process_has_open_is_never_unbound(host: Host, state: Path) -> None:
    left_by_another(host, state, NVME)
    host.path("sys/bus/pci/devices", NVME, "driver").unlink()
    host._bind(NVME, "vfio-pci")
    host.process(4711, "udevd", nodes=("/dev/vfio/7",))  # whatever it calls itself
    [result] = restore(host, state)
    assert (result.outcome, result.detail) == ("failed", f"{NVME} is still open in process 4711 (udevd)")
    assert host.driver(Bdf.parse(NVME)) == "vfio-pci"


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_does_not_keep_a_device(host: Host, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with borrow(NIC, sysfs=host, state_dir=state):
        monkeypatch.setattr(Journal, "write", full_disk)
        monkeypatch.setattr(os, "pwrite", full_disk)
    assert host.state(NIC) == ("e1000e", None)
    assert list((state / "journal").iterdir()) == []
    with pytest.raises(OSError, match="No space left"), borrow(NIC, sysfs=host, state_dir=state):
        pass  # without a record nothing is taken
    assert host.state(NIC) == ("e1000e", None)


def test_a_full_disk_is_named(host: Host, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="No space left") as refused, borrow(NIC, sysfs=host, state_dir=state):
        pass
    assert refused.value.filename == str(state / "journal" / f"{NIC}.json")
    assert refused.value.__notes__[0] == "free some space there, or set KVMPASS_STATE_DIR to another directory"
    assert host.state(NIC) == ("e1000e", None)
    assert list((state / "journal").iterdir()) == []


def test_a_device_that_came_into_use_during_the_wait_is_not_taken(
    host: Host, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Journal.lock

    def lock(journal: Journal, *arguments: Any) -> Any:
        host.put(f"sys/devices/pci0000:00/{NIC}/boot_vga", "1")
        return original(journal, *arguments)

    monkeypatch.setattr(Journal, "lock", lock)
    with pytest.raises(DeviceInUse, match="display"), borrow(NIC, sysfs=host, state_dir=state):
        pass
    assert host.state(NIC) == ("e1000e", None)


def test_success_is_said_of_no_device_that_was_taken_meanwhile(host: Host, state: Path) -> None:
    bound = threading.Event()  # each device has a thread

    def rebind(step: Step, bdf: Bdf) -> None:
        if (step, str(bdf)) == (Step.BOUND, NIC):
            bound.set()
        if (step, str(bdf)) == (Step.BOUND, NVME):
            assert bound.wait(20)
            link = host.path("sys/bus/pci/devices", NIC, "driver")
            link.with_name("other").symlink_to(host.path("sys/bus/pci/drivers/e1000e"))
            link.with_name("other").replace(link)

    with pytest.raises(NotAssignable, match=f"{NIC} is bound to e1000e now"):
        bind([NIC, NVME], sysfs=host, state_dir=state, on_step=rebind)
    assert (host.state(NVME), host.state(NIC)) == (("nvme", None), ("e1000e", None))
    assert unbind([NVME], sysfs=host, state_dir=state)[0].outcome == "already"


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", "", "a\n", "x" * 200, "\ud800"])
def test_a_name_that_would_be_another_path_is_no_entry(host: Host, state: Path, name: str) -> None:
    left_by_another(host, state, NIC, driver=name)
    host.writes.clear()
    [result] = restore(host, state)
    assert result.outcome == "corrupt"
    assert host.writes == []


def test_files_that_are_no_entries_do_not_keep_the_others(host: Host, state: Path) -> None:
    left_by_another(host, state, NVME)
    journal = state / "journal"
    left_by_another(host, state, NIC).rename(journal / "0000:0A:00.0.json")
    (journal / "0000:0b:00.0.json").mkdir()
    (journal / "0000:0c:00.0.json").write_text("[" * 200_000)
    outcomes = {result.bdf: result.outcome for result in restore(host, state)}
    assert outcomes == {
        NVME: "restored",
        "0000:0A:00.0": "corrupt",
        "0000:0b:00.0": "failed",
        "0000:0c:00.0": "corrupt",
    }


def test_symlinks_are_not_followed(host: Host, state: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("untouched")
    (state / "journal").mkdir(parents=True)
    (state / "journal" / f"{NIC}.tmp").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        bind([NIC], sysfs=host, state_dir=state)
    (state / "journal" / f"{NIC}.tmp").unlink()
    (state / "lock").unlink()
    (state / "lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        bind([NIC], sysfs=host, state_dir=state)
    assert target.read_text() == "untouched"
    assert host.state(NIC) == ("e1000e", None)


def test_a_last_word_that_nobody_hears(host: Host, state: Path) -> None:
    """The terminal is gone while another process has the lock."""

    def say(line: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Journal(state).lock():
            held.set()
            done.wait(1.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with borrow(NIC, sysfs=host, state_dir=state, say=say):
        assert host.state(NIC)[0] == "vfio-pci"
    done.set()
    thread.join()
    assert host.state(NIC) == ("e1000e", None)


def test_virtual_functions_whose_ids_read_as_ones_are_not_silent(host: Host) -> None:
    host.path("sys/bus/pci/devices", NIC, "config").write_bytes(b"\xff" * 4 + bytes(60))
    kinds = {finding.blocker.kind for finding in diagnose(host, Bdf.parse(NIC)) if finding.blocker and finding.bdf}
    assert "device-no-response" not in kinds


@pytest.mark.parametrize(("class_code", "bridge"), [(0x060000, True), (0x060400, True), (0x068000, False)])
def test_what_is_a_bridge(host: Host, class_code: int, bridge: bool) -> None:
    host.add("0000:03:00.0", None, 11, class_code)
    device = host.device(Bdf(0, 3, 0, 0))
    assert [blocker.kind for blocker in blockers(host, device)] == (["bridge"] if bridge else [])


def test_a_restore_that_fails_says_so_and_tries_again(host: Host, state: Path) -> None:
    host.refuses.add("e1000e")
    left_by_another(host, state, NIC)
    host.path("sys/bus/pci/devices", NIC, "driver").unlink()
    assert [result.outcome for result in restore(host, state)] == ["failed"]
    host.refuses.clear()
    assert [result.outcome for result in restore(host, state)] == ["restored"]
    assert host.state(NIC) == ("e1000e", None)


@pytest.mark.parametrize(("release", "kinds"), [("6.12.5-amd64", ["device-direct-mapped"]), ("6.1.0-30-amd64", [])])
def test_memory_that_the_firmware_wants_one_to_one(host: Host, state: Path, release: str, kinds: list[str]) -> None:
    """VFIO refuses such a device from Linux 6.6 on: known before its driver is touched."""
    host.put("proc/sys/kernel/osrelease", release)
    host.put("sys/kernel/iommu_groups/9/reserved_regions", "0x00000000fd000000 0x00000000fd0fffff direct")
    assert [blocker.kind for blocker in blockers(host, host.device(Bdf.parse(NIC)))] == kinds
    [bound] = bind([NIC], sysfs=host, state_dir=state)  # that it can be
    assert (bound.outcome, len(bound.warnings)) == ("changed", len(kinds))


@pytest.mark.parametrize(("release", "kinds"), [("6.12.5-amd64", []), ("5.15.0", ["boot-framebuffer"])])
def test_vfio_pci_takes_the_console_off_a_display(host: Host, release: str, kinds: list[str]) -> None:
    host.put("proc/sys/kernel/osrelease", release)
    host.put("proc/iomem", "fe000000-fe0fffff : efifb\nnot a range : efifb")
    host.put(f"sys/devices/pci0000:00/{NIC}/class", "0x030000")
    found = [finding.blocker for finding in diagnose(host, Bdf.parse(NIC)) if finding.bdf and finding.blocker]
    assert [blocker.kind for blocker in found if "framebuffer" in blocker.kind] == kinds


def test_another_device_in_the_same_slot_is_not_taken_for_the_first(host: Host, state: Path) -> None:
    bind([NIC], sysfs=host, state_dir=state)
    host.put(f"sys/devices/pci0000:00/{NIC}/device", "0x4321")
    host.natural[NIC] = "ahci"
    host.add_driver("ahci")
    [result] = unbind([NIC], sysfs=host, state_dir=state)
    assert (result.outcome, result.after) == ("changed", "ahci")  # not e1000e, which the first had
    left_by_another(host, state, NIC, ids="8086:0001:0000:0000")
    host.writes.clear()
    assert [(result.outcome, result.detail.partition(":")[0]) for result in restore(host, state)] == [
        ("stale", "of another device at that address")
    ]
    assert host.writes == []


def test_a_virtual_function_has_no_file_to_remove_it_by(host: Host, state: Path) -> None:
    host.path("sys/bus/pci/devices", NIC, "remove").unlink()
    with borrow(NIC, sysfs=host, state_dir=state):
        assert host.state(NIC)[0] == "vfio-pci"
    assert host.state(NIC) == ("e1000e", None)
