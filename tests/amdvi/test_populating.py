"""Memory is populated while the rest is checked and made: what an end in the middle of it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.guests import kvmpass

from kvmpass import host
from kvmpass.host import Bdf, Sysfs
from kvmpass.layout import MIB

SIZE, SOME = 1024 * MIB, 64 * MIB
LARGE = 2048 * MIB  # an import, which defers signals, takes half a second of the CPU that it shares with populating


def resident(pid: int) -> int:
    """Bytes that a process has; 0 once it has ended."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_at_once(nvme: str, number: signal.Signals) -> None:
    """No driver has been unbound by then. The process has little more memory than when the signal came."""
    driver = Sysfs().driver(Bdf.parse(nvme))
    words = kvmpass("assign", "-v", "--memory", f"{LARGE >> 20}M", nvme, "--", "true")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        started = resident(process.pid)
        while (now := resident(process.pid)) < started + SOME:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.002)
        process.send_signal(number)
        most = now
        while process.poll() is None:
            most = max(most, resident(process.pid))
            time.sleep(0.002)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode in ({signal.SIGINT: 130, signal.SIGTERM: 143}.get(number), -number)
    assert most < LARGE // 2, f"{most >> 20} MiB were populated: {said}"
    assert "vfio-pci" not in said, "a driver was changed"
    assert Sysfs().driver(Bdf.parse(nvme)) == driver
    assert host.restore() == []


def test_a_device_in_use_is_said_while_memory_is_populated(edu: str, nvme: str) -> None:
    """The reason is the device, as if memory had not been touched."""
    with host.borrow(edu):
        group = Sysfs().device(Bdf.parse(edu)).group
        with Path(f"/dev/vfio/{group}").open("rb+", buffering=0):
            done = subprocess.run(
                kvmpass("assign", "--memory", f"{SIZE >> 20}M", edu, nvme, "--", "true"),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
    assert done.returncode == 125
    assert f"{edu} is assigned by process {os.getpid()}" in done.stderr
