"""Uevents of the kernel as events, against a made-up host and made-up uevents."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.host_tree import Host

from kvmpass import host as library
from kvmpass.cli.main import main
from kvmpass.errors import HostNotReady
from kvmpass.host import Bdf, watch_events
from kvmpass.host.view.watching import HostEvent, Uevent

NVME = "0000:01:00.0"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.add(NVME, "nvme", 7)
    host.add("0000:02:00.0", "e1000e", 8, 0x020000)
    return host


def pci(action: str, bdf: str, **more: str) -> Uevent:
    return {"ACTION": action, "SUBSYSTEM": "pci", "PCI_SLOT_NAME": bdf, "PCI_ID": "1022:1234", "SEQNUM": "7", **more}


def vfio(action: str, node: str) -> Uevent:
    return {"ACTION": action, "SUBSYSTEM": "vfio", "DEVNAME": node}


Step = Uevent | OSError | Callable[[], object]


def watch(host: Host, steps: Sequence[Step], *filters: str) -> list[HostEvent]:
    """The events of ``steps``, which happen one after the other: uevents, failures, changes of the host."""
    left = iter(steps)

    def source(seconds: float) -> Uevent | None:
        step = next(left)
        if isinstance(step, OSError):
            raise step
        if callable(step):
            step()
            return None
        return step

    waiting = itertools.count()
    return list(watch_events(host, filters, source=source, until=lambda: next(waiting) == len(steps)))


def brief(events: Sequence[HostEvent]) -> list[tuple[object, ...]]:
    return [(event.kind, str(event.bdf or ""), event.driver, event.group) for event in events]


def test_a_device_changes_drivers(host: Host) -> None:
    steps = [
        pci("unbind", NVME),
        vfio("add", "/dev/vfio/7"),
        pci("bind", NVME, DRIVER="vfio-pci"),
        pci("unbind", NVME),
        vfio("remove", "vfio/7"),
        pci("bind", NVME, DRIVER="nvme"),
    ]
    events = watch(host, steps)
    assert brief(events) == [
        ("driver-unbound", NVME, "nvme", 7),
        ("group-appeared", "", None, 7),
        ("driver-bound", NVME, "vfio-pci", 7),
        ("driver-unbound", NVME, "vfio-pci", 7),
        ("group-vanished", "", None, 7),
        ("driver-bound", NVME, "nvme", 7),
    ]
    assert events[1].devices == (Bdf.parse(NVME),)
    assert (events[0].vendor, events[0].device) == (0x1022, 0x1234)
    assert abs(events[0].time - time.time()) < 60


def test_a_device_comes_and_goes(host: Host) -> None:
    """Its last event tells its group, which sysfs has forgotten by then."""
    steps: list[Step] = [
        lambda: host.add("0000:03:00.0", None, 9),
        pci("add", "0000:03:00.0"),
        lambda: host.remove("0000:03:00.0"),
        pci("remove", "0000:03:00.0"),
        pci("remove", "0000:03:00.0"),
    ]
    events = watch(host, steps)
    assert brief(events)[:2] == [
        ("device-added", "0000:03:00.0", None, 9),
        ("device-removed", "0000:03:00.0", None, 9),
    ]
    assert events[2].group is None, "forgotten here, too"


def test_what_else_changed(host: Host) -> None:
    (event,) = watch(host, [pci("change", NVME, ERROR_EVENT="BEGIN_RECOVERY", DEVICE_ONLINE="0", DRIVER="nvme")])
    assert (event.kind, event.detail) == ("device-changed", "DEVICE_ONLINE=0 ERROR_EVENT=BEGIN_RECOVERY")


def test_what_is_none_of_ours(host: Host) -> None:
    strange = [pci("move", NVME), vfio("add", "vfio/vfio")]
    strange += [{"ACTION": "add", "SUBSYSTEM": subsystem} for subsystem in ("net", "pci")]
    assert watch(host, strange) == []


def test_events_that_are_lost_are_said_to_be(host: Host) -> None:
    steps = [OSError(errno.ENOBUFS, "No buffer space available"), pci("bind", NVME, DRIVER="nvme")]
    assert [event.kind for event in watch(host, steps)] == ["events-lost", "driver-bound"]
    with pytest.raises(OSError, match="Bad file"):
        watch(host, [OSError(errno.EBADF, "Bad file descriptor")])


def test_a_pattern_matches_the_name_of_a_device_that_was_removed(host: Host) -> None:
    host.put("usr/share/misc/pci.ids", "1022  Maker\n\t1234  Gadget\n")
    events = watch(
        host, [pci("remove", "0000:05:00.0"), pci("unbind", "0000:02:00.0", PCI_ID="8086:10D3")], "*gadget*"
    )
    assert brief(events) == [("device-removed", "0000:05:00.0", None, None)]


def test_filters_are_looked_at_when_it_happens(host: Host) -> None:
    """``eth0`` is there only while its driver is; a device can be named before it comes."""
    host.add_below("0000:02:00.0", "sys/class/net", "eth0")
    steps: list[Step] = [
        host.path("sys/class/net/eth0").unlink,
        pci("unbind", "0000:02:00.0"),
        pci("unbind", NVME),
        pci("add", "0000:05:00.0"),
        vfio("add", "vfio/8"),
        vfio("add", "vfio/7"),
    ]
    events = watch(host, steps, "eth0", "05:00")
    assert [(event.kind, event.group) for event in events] == [
        ("driver-unbound", 8),
        ("device-added", None),
        ("group-appeared", 8),
    ]
    assert brief(watch(host, [pci("unbind", NVME)], "nvme")) == [("driver-unbound", NVME, "nvme", 7)]


def test_it_ends_in_time(host: Host) -> None:
    assert list(watch_events(host, timeout=0.05, source=lambda seconds: time.sleep(seconds))) == []


def test_without_libudev(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pyudev = pytest.importorskip("pyudev")

    def context() -> None:
        raise ImportError("No library named udev")

    monkeypatch.setattr(pyudev, "Context", context)
    with pytest.raises(HostNotReady, match="No library named udev"):
        watch_events(host)


# --- the command


@pytest.fixture
def command(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs ``kvmpass monitor`` with the given uevents; after them nothing happens any more."""
    monkeypatch.setattr(library, "Sysfs", lambda: host)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    def run(uevents: Sequence[Uevent], *arguments: str) -> int:
        left = iter(uevents)

        def source(seconds: float) -> Uevent | None:
            uevent = next(left, None)
            if uevent is None:
                time.sleep(seconds)
            return uevent

        monkeypatch.setattr("kvmpass.host.view.watching._netlink", lambda: source)
        with pytest.raises(SystemExit) as ended:
            main(["monitor", *arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


STEPS = (pci("unbind", NVME), vfio("add", "vfio/7"), pci("bind", NVME, DRIVER="vfio-pci"), pci("add", "0000:09:00.0"))


def test_lines_for_people(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(STEPS, "--count", "4") == 0
    output, errors = capsys.readouterr()
    assert errors == "kvmpass: watching\n"
    assert [line[14:] for line in output.splitlines()] == [
        "unbound   0000:01:00.0  from nvme",
        "appeared  /dev/vfio/7   0000:01:00.0",
        "bound     0000:01:00.0  to vfio-pci",
        "added     0000:09:00.0  no group, 1022:1234",
    ]
    moment = output[:12]
    assert time.strptime(moment[:8], "%H:%M:%S") and moment[8] == "." and moment[9:].isdecimal()


def test_json_lines(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], valid: Callable[[str, str], Any]
) -> None:
    assert command(STEPS, "--json", "--count", "4", "-q") == 0
    output, errors = capsys.readouterr()
    records = [valid("monitor", line) for line in output.splitlines()]
    assert errors == ""
    assert [record["event"] for record in records] == [
        "driver-unbound",
        "group-appeared",
        "driver-bound",
        "device-added",
    ]
    assert records[1]["bdfs"] == [NVME] and records[1]["bdf"] is None
    assert records[2]["driver"] == "vfio-pci"


def test_fewer_events_than_asked_for(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(STEPS[:1], "--count", "2", "--timeout", "1") == 1
    assert "1 of 2 events in 1 seconds" in capsys.readouterr().err
    assert command(STEPS[:1], "--timeout", "0.1") == 0


def test_a_reader_that_goes_ends_it(command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing happens any more: a pipe without reader shows it before it is written to."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert command((), "--timeout", "20", "--count", "1") == 0
        monkeypatch.undo()
