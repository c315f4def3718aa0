"""Guests that stay: many commands in one boot, and what ends them."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

import kvmpass as library
from kvmpass import host
from kvmpass.errors import GuestDied

pytestmark = [pytest.mark.amdvi(duration=25), pytest.mark.usefixtures("as_without_tests")]
SOAK = bool(os.environ.get("KVMPASS_SOAK"))
COMMANDS = 200 if SOAK else 30
AT_ONCE = 10
MEBIBYTE = 1 << 20
SECONDS = 100


def driver(bdf: str) -> str | None:
    return host.Sysfs().driver(host.Bdf.parse(bdf))


def test_many_threads_and_a_panic(nvme: str) -> None:
    """One boot: commands from ten threads, each with a megabyte each way; then a panic while ten of them run."""
    data = os.urandom(MEBIBYTE)

    def work(number: int) -> None:
        result = guest.run(["sh", "-c", f"cat; echo {number} >&2; exit {number % 100}"], input=data, timeout=SECONDS)
        assert (result.returncode, result.stdout == data) == (number % 100, True)
        assert result.stderr == b"%d\n" % number

    with library.start([nvme], memory="256M") as guest, ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(COMMANDS)))
        with pytest.raises(subprocess.TimeoutExpired):
            guest.run(["sleep", "1000"], timeout=0.5)
        full = guest.run(["sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt; cat /dev/zero >/mnt/file"])
        assert (full.returncode, b"No space left" in full.stderr) == (1, True)
        assert "Linux version" in guest.dmesg()
        waiting = [pool.submit(guest.run, ["sleep", "1000"]) for _ in range(AT_ONCE - 1)]
        waiting.append(pool.submit(guest.popen(["cat", "/dev/zero"], stdout=subprocess.DEVNULL).wait))
        with pytest.raises(GuestDied, match=r"the guest panicked: "):
            guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"], timeout=SECONDS)
        for future in waiting:
            died = future.exception(SECONDS)
            assert isinstance(died, GuestDied)
            assert "sysrq triggered crash" in died.console
        assert guest.stop().outcome is library.GuestOutcome.PANIC
    assert driver(nvme) == "nvme"
