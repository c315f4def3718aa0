"""The plugin's own guests: one boot for several tests. For one that a test has ended see ``test_project.py``."""

from __future__ import annotations

import subprocess
import time

import pytest

from kvmpass import GuestOutcome, Session

pytestmark = [pytest.mark.amdvi(duration=15), pytest.mark.guest(devices=("nvme",), memory="256M")]


def test_a_guest_has_the_device(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-b", "/dev/nvme0n1"]).returncode == 0
    assert kvmpass_guest.run(["touch", "/tmp/was-here"]).returncode == 0


def test_the_next_test_has_the_same_guest(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-e", "/tmp/was-here"]).returncode == 0


HANG_THE_AGENT = r"""
set -- $(sed -n '/ r-xp /{s/-/ /p;q}' /proc/1/maps)
printf '\353\376' | dd of=/proc/1/mem bs=2 seek=$((0x$2 / 2 - 1)) conv=notrunc
tr '\0' '\220' </dev/zero | dd of=/proc/1/mem bs=2 seek=$((0x$1 / 2)) count=$(((0x$2 - 0x$1) / 2 - 1)) conv=notrunc
"""


@pytest.mark.guest(devices=("nvme",), memory="256M", may_die=True)
def test_a_guest_whose_agent_hangs_is_stopped_in_time(kvmpass_guest: Session) -> None:
    """Its code becomes a loop; nothing is said to the host then."""
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        kvmpass_guest.run(["sh", "-c", HANG_THE_AGENT], timeout=3)
    with pytest.raises(subprocess.TimeoutExpired):
        kvmpass_guest.run(["true"], timeout=1)
    assert kvmpass_guest.stop(1).outcome is GuestOutcome.STOPPED
    assert time.monotonic() - started < 20
