"""Virtio devices that daemons serve, in guests that have an assigned device as well."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import daemons
from support.witness import Edu, pattern

from kvmpass import host
from kvmpass.events import DaemonEnded, DeviceEvent, DeviceReleased
from kvmpass.guest import Guest, GuestSpec, prepare
from kvmpass.host import Sysfs
from kvmpass.layout import GIB, MIB
from kvmpass.machine import GuestOutcome, Machine
from kvmpass.machine.remotes import Remote
from kvmpass.memory import Backing
from kvmpass.virtio.fs import MODALIAS

pytestmark = pytest.mark.amdvi(duration=30)
REQUESTS = 1000

# Twice: the guest reboots, and finds what it has written.
SCRIPT = f"""
mkdir /mnt; mount -t virtiofs files /mnt || exit 9
if [ ! -e /mnt/first ]; then
    sha256sum /mnt/data /dev/vda
    echo of the guest | tee /mnt/first /dev/vda
    sync
    echo begin; sleep 1
    i=0; while [ $i -lt {REQUESTS} ]; do [ -e /mnt/absent$i ]; i=$((i+1)); done
    echo end; sleep 1
    mkdir -p /more; until mount -t virtiofs more /more 2>/dev/null; do usleep 100000; done
    cat /more/data; umount /more; echo ejecting
    while [ -d /sys/bus/pci/devices/0000:00:1c.0 ]; do usleep 100000; done
    reboot -f
fi
cat /mnt/first; head -c 13 /dev/vda; echo killing
while [ -e /mnt/data ]; do usleep 10000; done
echo unreachable
"""


def switches(thread: threading.Thread) -> int:
    """How often a thread has gone to sleep: as often as it was woken."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return sum(int(count) for count in re.findall(r"ctxt_switches:\s*(\d+)", status))


class Reader:
    """Takes what the guest says, and acts on some lines."""

    def __init__(self) -> None:
        self.said = ""
        self.actions: dict[str, Callable[[], None]] = {}

    def __call__(self, data: bytes) -> None:
        self.said += data.decode()
        for word in [word for word in self.actions if f"{word}\n" in self.said]:
            self.actions.pop(word)()


class Counts:
    """Exits, and how often the threads of the devices' front ends have run."""

    def __init__(self, machine: Machine) -> None:
        self.exits = sum(machine.exit_reasons.values())
        threads = [thread for thread in threading.enumerate() if thread.name in ("file system files", "drive")]
        assert len(threads) == 2
        self.woken = sum(map(switches, threads))


def processes_and_files() -> tuple[set[str], list[str]]:
    """Threads, and open files but those of tests."""
    files = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]  # noqa: PTH115
    kinds = [re.sub(r"\d+", "N", file) for file in files if not file.startswith("/")]
    return {thread.name for thread in threading.enumerate()}, sorted(kinds)


def test_a_guest_with_a_directory_and_a_drive_of_daemons(edu: str, tmp_path: Path) -> None:
    """Requests cause no exit and wake no thread here; memory comes and goes; reboot; then one daemon is killed."""
    shared, content, disk = tmp_path / "shared", os.urandom(3_000_000), os.urandom(1 * MIB)
    second = tmp_path / "second"
    shared.mkdir()
    second.mkdir()
    (second / "data").write_text("plugged later\n")
    (shared / "data").write_bytes(content)
    (tmp_path / "disk").write_bytes(disk)
    sysfs, events, reader = Sysfs(), list[DeviceEvent](), Reader()
    aliases = [sysfs.device(host.Bdf.parse(edu)).modalias, MODALIAS, daemons.BLOCK_MODALIAS]
    image = prepare(GuestSpec(command=("sh", "-c", SCRIPT)), aliases)
    before = processes_and_files()
    with (
        host.borrow(edu),
        daemons.virtiofsd(shared, tmp_path / "files") as process,
        daemons.storage_daemon(tmp_path / "disk", tmp_path / "drive") as storage,
        daemons.virtiofsd(second, tmp_path / "more") as other,
    ):
        with Machine(memory="192M", backing=Backing.MEMFD, on_event=events.append) as machine:
            device = machine.assign(edu)
            machine.add_filesystem("files", tmp_path / "files")
            machine.add_remote("drive", tmp_path / "drive", daemons.block_device)
            machine.audit()
            counts: dict[str, Counts] = {}

            def change_memory() -> None:
                for _ in range(2):
                    region = machine.memory.add_ram(5 * GIB, 64 * MIB, "added", backing=Backing.MEMFD)
                    machine.audit()
                    machine.memory.remove(region)
                    machine.audit()
                counts["begin"] = Counts(machine)

            def hot_plug() -> None:
                counts["end"] = Counts(machine)
                plugged.append(machine.add_filesystem("more", tmp_path / "more"))
                assert plugged[0].slot == 28
                machine.audit()

            plugged: list[Remote] = []
            reader.actions["begin"] = change_memory
            reader.actions["end"] = hot_plug
            reader.actions["ejecting"] = lambda: machine.remove_remote(plugged[0], 60)
            reader.actions["killing"] = process.kill
            image.load(machine)
            with Guest(machine, console=None, output=reader, errors=reader) as guest:
                result = guest.run(timeout=240, restart=True)
            print(machine.exit_reasons, reader.said, result.console[-1000:])
            machine.audit()
            check_dma_reaches_the_shared_pages(machine, Edu(device))
        assert processes_and_files() == before, "threads, descriptors, sockets and memfds"
        assert (result.outcome, result.failures) == (GuestOutcome.DEVICE_ERROR, ()), result
        ended = [event for event in events if isinstance(event, DaemonEnded)]
        assert [event.bdf for event in ended] == ["file system files"]
        released = [event for event in events if isinstance(event, DeviceReleased)]
        assert [(event.bdf, event.by) for event in released] == [("file system more", "guest")]
        assert other.wait(20) == 0, "its connection was closed"
        assert storage.poll() is None
        with Machine(memory="16M", backing=Backing.MEMFD) as machine:
            machine.add_remote("drive", tmp_path / "drive", daemons.block_device)
            machine.audit()
        assert processes_and_files() == before
    digests = [hashlib.sha256(data).hexdigest() for data in (content, disk)]
    assert re.findall(r"^(\w{64}) ", reader.said, re.MULTILINE) == digests
    assert reader.said.count("of the guest\n") == 3
    assert reader.said.count("plugged later\n") == 1
    assert "unreachable" not in reader.said
    assert (shared / "first").read_text() == "of the guest\n"
    assert (tmp_path / "disk").read_bytes() == b"of the guest\n" + disk[13:]
    exits = counts["end"].exits - counts["begin"].exits
    woken = counts["end"].woken - counts["begin"].woken
    print(f"{exits} exits, {woken} times woken, for {REQUESTS} requests")
    assert exits < REQUESTS / 10
    assert woken <= 4


def check_dma_reaches_the_shared_pages(machine: Machine, edu: Edu) -> None:
    """An assigned device and a daemon see the same bytes."""
    region = next(iter(machine.memory))
    data, at = pattern(), 16 * MIB
    with mmap.mmap(region.file, region.size) as pages:
        pages[at : at + 16] = data
        edu.load(at)
        edu.store(at + 16)
        assert pages[at + 16 : at + 32] == data
