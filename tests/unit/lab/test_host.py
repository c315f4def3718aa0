"""What a host's waiting does when nothing is heard from the emulator."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest

from kvmpass.lab import LabConfig, host
from kvmpass.lab.channels import Channels, Lines
from kvmpass.lab.host import STATUS, Host


@pytest.mark.parametrize(
    ("cpu_times", "woken"),
    [([7.0, 7.0, 7.0], 2), ([7.0, 7.01, 7.02], 0), ([None, None, None], 0)],
    ids=["no CPU time", "some", "unknown"],
)
def test_a_stalled_host_is_woken(monkeypatch: pytest.MonkeyPatch, cpu_times: list[float | None], woken: int) -> None:
    monkeypatch.setattr(host, "STALL_SECONDS", 0.01)
    channels = Channels([STATUS])
    times: Iterator[float | None] = iter(cpu_times)
    emulated = Host(LabConfig(), print)
    with emulated:
        emulated._lines = Lines(channels.outer[STATUS])
        emulated._deadline = math.inf

        def cpu_time() -> float | None:
            value = next(times, "end")
            if isinstance(value, str):
                os.write(channels.inner[STATUS], b"exit 0\n")
                return None
            return value

        monkeypatch.setattr(emulated, "cpu_time", cpu_time)
        monkeypatch.setattr(emulated, "_finish", lambda line: line)
        assert emulated.wait() == "exit 0"
    with open(channels.inner[STATUS], "rb", buffering=0, closefd=False) as inner:
        os.set_blocking(inner.fileno(), False)
        assert (inner.read(100) or b"") == b"\n" * woken
    assert emulated._woken == woken
    channels.close()
