"""The plugin's own guests: one boot for several tests. For one that a test has ended see ``test_project.py``."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from kvmpass import GuestOutcome, Session
from kvmpass.errors import GuestError
from kvmpass.guest import agent

SECONDS = 30
pytestmark = [pytest.mark.amdvi(duration=15), pytest.mark.guest(devices=("nvme",), memory="256M")]


def test_a_guest_has_the_device(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-b", "/dev/nvme0n1"]).returncode == 0
    assert kvmpass_guest.run(["touch", "/tmp/was-here"]).returncode == 0


def test_the_next_test_has_the_same_guest(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-e", "/tmp/was-here"]).returncode == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_busy_guest_answers_and_one_that_does_not_run_does_not(
    kvmpass_guest: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it starts no commands; it does once it runs again."""
    monkeypatch.setattr(agent, "SILENT_SECONDS", 0.5)
    busy = [kvmpass_guest.popen(["sh", "-c", "while :; do :; done"]) for _ in range(4)]
    started = kvmpass_guest._agent._heard
    wait_until(lambda: kvmpass_guest._agent._heard > started)  # a ping was answered: nothing else is said
    assert kvmpass_guest.answering
    monkeypatch.setattr(agent, "ANSWER_SECONDS", 0.5)
    kvmpass_guest.machine.pause(30)
    try:
        wait_until(lambda: not kvmpass_guest.answering)
        with pytest.raises(GuestError, match="the guest does not answer"):
            kvmpass_guest.run(["true"])
    finally:
        kvmpass_guest.machine.resume()
    wait_until(lambda: kvmpass_guest.answering)
    for process in busy:
        process.kill()
        assert process.wait(SECONDS) == -signal.SIGKILL


# In whole pages, and silently: an agent that wakes up in between would run into the middle of an instruction.
HANG_THE_AGENT = r"""
exec >/dev/null 2>&1
set -- $(sed -n '/ r-xp /{s/-/ /p;q}' /proc/1/maps)
head -c $((0x$2 - 0x$1 - 2)) /dev/zero | tr '\0' '\220' >/tmp/loop
printf '\353\376' >>/tmp/loop
dd if=/tmp/loop of=/proc/1/mem bs=4096 seek=$((0x$1 / 4096)) conv=notrunc
echo overwritten >/dev/console
"""


@pytest.mark.guest(devices=("nvme",), memory="256M", may_die=True)
def test_a_guest_whose_agent_hangs_is_stopped_in_time(kvmpass_guest: Session) -> None:
    """Its code becomes a loop; nothing is said to the host then."""
    kvmpass_guest.popen(["sh", "-c", HANG_THE_AGENT], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: "overwritten" in kvmpass_guest.console)
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        kvmpass_guest.run(["true"], timeout=1)
    assert kvmpass_guest.stop(1).outcome is GuestOutcome.STOPPED
    assert time.monotonic() - started < 20
