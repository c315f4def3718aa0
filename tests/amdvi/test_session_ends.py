"""What ends a guest that stays, or does not: many commands at once, failures of devices and agents, SIGKILL."""

from __future__ import annotations

import os
import random
import select
import signal
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.guests import kvmpass, run
from support.sessions import MEBIBYTE, driver, expected, guests, worker, zeroes

import kvmpass as library
from kvmpass.errors import GuestDied, GuestError
from kvmpass.events import DeviceReleased, DeviceRequest
from kvmpass.session.directory import base_directory

pytestmark = [pytest.mark.amdvi(duration=25), pytest.mark.usefixtures("as_without_tests")]
SOAK = bool(os.environ.get("KVMPASS_SOAK"))
COMMANDS = 200 if SOAK else 20
AT_ONCE = 10
SECONDS = 100
KILLS = 40 if SOAK else 2
LATEST_KILL = 16.0 if SOAK else 8.0  # seconds from the start, with load once the guest is up
MOST_OVERHEAD = 0.1  # seconds that a command costs more than a process of the guest


@pytest.mark.amdvi(duration=20)
def test_killed_at_random_moments(nvme: str) -> None:
    """SIGKILL while a guest starts, and in the long form while it works: ``restore`` leaves nothing of it."""
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    for _ in range(KILLS):
        seconds = moments.uniform(0.2, LATEST_KILL)
        kill_after(seconds, nvme)
        restored = run("restore")
        left = [path.name for path in base_directory().glob("*")]
        assert (restored.returncode, driver(nvme), left) == (0, "nvme", []), (seed, seconds, restored)
    assert nvme.encode() not in run("restore").stdout


def kill_after(seconds: float, nvme: str) -> None:
    """Start a guest, let it work once it is up, and kill all processes of kvmpass some seconds after the start."""
    deadline = time.monotonic() + seconds
    arguments = ("start", "--memory", "192M", "--name", "stage", nvme)
    starter = subprocess.Popen(kvmpass(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    load: list[subprocess.Popen[bytes]] = []
    try:
        assert starter.wait(seconds) == 0
        load = [zeroes("stage") for _ in "ab"]
        script = "echo reads >&2; while cat /dev/nvme0n1; do :; done"
        words = kvmpass("exec", "stage", "--", "sh", "-c", script)
        load.append(reading := subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        assert reading.stderr is not None
        assert reading.stderr.readline() == b"reads\n"
        threading.Event().wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        starter.send_signal(signal.SIGSTOP)  # it forks no more
    victims = {*children(starter.pid), *(guest["pid"] for guest in guests())} - {0}
    for pid in victims:
        end = os.pidfd_open(pid)
        signal.pidfd_send_signal(end, signal.SIGKILL)
        assert select.select([end], [], [], SECONDS)[0]
        os.close(end)
    starter.kill()
    starter.wait(SECONDS)
    for process in load:
        process.communicate(timeout=SECONDS)
        assert process.returncode == 126


def children(parent: int) -> list[int]:
    """The processes whose parent is ``parent`` (proc(5))."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if path.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(int(path.parent.name))
    return found


CRASH_THE_AGENT = """
set -- $(sed -n '/ r-xp /{s/-/ /p;q}' /proc/1/maps)
dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((0x$1 / 4096)) count=$(((0x$2 - 0x$1) / 4096)) conv=notrunc
sleep 1000
"""


def test_many_threads_and_the_agents_death(nvme: str, nvme2: str, tmp_path: Path) -> None:
    """One boot: commands from ten threads, a megabyte each way; a drive that is removed; a crash under load."""
    data = os.urandom(MEBIBYTE)

    def work(number: int) -> None:
        result = guest.run(worker(number), input=data, timeout=SECONDS)
        assert (result.returncode, result.stdout == data) == (expected(number), True)
        assert result.stderr == b"%d\n" % number

    with library.start([nvme, nvme2], memory="256M") as guest, ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(COMMANDS)))
        with pytest.raises(FileNotFoundError):
            guest.run(["no-such-program"])
        assert guest.run(["sh", "-c", "kill -9 $$"]).returncode == -signal.SIGKILL
        with pytest.raises(subprocess.TimeoutExpired):
            guest.run(["sleep", "1000"], timeout=0.5)
        full = guest.run(["sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt; cat /dev/zero >/mnt/file"])
        assert (full.returncode, b"No space left" in full.stderr) == (1, True)
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(GuestError, match=r"was not copied into the guest: .*No space left"):
            guest.copy_in(tmp_path / "file", "/mnt/")
        assert "Linux version" in guest.dmesg()
        commands_cost_little(guest)
        removed_by_the_host(guest, nvme2)
        waiting = [pool.submit(guest.run, ["sleep", "1000"]) for _ in range(AT_ONCE - 1)]
        waiting.append(pool.submit(guest.popen(["cat", "/dev/zero"], stdout=subprocess.DEVNULL).wait))
        with pytest.raises(GuestDied, match=r"the guest panicked: .*Attempted to kill init"):
            guest.run(["sh", "-c", CRASH_THE_AGENT], timeout=SECONDS)
        for future in waiting:
            died = future.exception(SECONDS)
            assert isinstance(died, GuestDied)
            assert "Attempted to kill init" in died.console
        assert guest.stop().outcome is library.GuestOutcome.PANIC
    assert (driver(nvme), driver(nvme2)) == ("nvme", "nvme")


def commands_cost_little(guest: library.Session) -> None:
    """A command takes hardly longer than the guest's own fork and exec, and Python handles no exit of it."""
    count = 20
    measured = []
    for _ in range(5):  # a busy machine may disturb one
        measured.append(overhead(guest, count))
        if measured[-1] <= MOST_OVERHEAD:
            return
    pytest.fail(f"a command costs more than a process of the guest by {measured} seconds")


def overhead(guest: library.Session, count: int) -> float:
    """The seconds that a command costs more than a process of the guest, by the median of ``count``."""
    started = time.monotonic()
    guest.run(["sh", "-c", f"i=0; while [ $i -lt {count} ]; do /bin/true; i=$((i+1)); done"], check=True)
    own = (time.monotonic() - started) / count
    exits, times = sum(guest.machine.exit_reasons.values()), []
    for _ in range(count):
        started = time.monotonic()
        guest.run(["true"], check=True)
        times.append(time.monotonic() - started)
    exits = sum(guest.machine.exit_reasons.values()) - exits
    assert exits < count, guest.machine.exit_reasons
    return statistics.median(times) - own


def removed_by_the_host(guest: library.Session, drive: str) -> None:
    """A drive is removed while the guest reads from it: the guest ejects it, and runs on."""
    node = "/sys/bus/pci/devices/0000:00:02.0"
    script = (
        f"d=/dev/$(basename {node}/nvme/*/nvme*n1); while dd if=$d of=/dev/null bs=64k count=16; do echo read; done"
    )
    reading = guest.popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert reading.stdout is not None
    assert reading.stdout.readline() == b"read\n"
    device = Path("/sys/bus/pci/devices") / drive
    try:
        (device / "remove").write_text("1")  # returns once nobody has it open
        assert not device.exists()
    finally:
        Path("/sys/bus/pci/rescan").write_text("1")
    reading.stdout.close()
    assert reading.wait(SECONDS) in (0, -signal.SIGPIPE)
    assert guest.run(["test", "-e", node]).returncode == 1
    assert {DeviceRequest(drive), DeviceReleased(drive, "guest")} <= {*guest.events}
