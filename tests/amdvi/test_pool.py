"""The plugin's own guests: one boot for several tests, and a new guest after one that a test has ended."""

from __future__ import annotations

import pytest

from kvmpass import Session

pytestmark = [pytest.mark.amdvi(duration=15), pytest.mark.guest(devices=("nvme",), memory="256M")]


def test_a_guest_has_the_device(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-b", "/dev/nvme0n1"]).returncode == 0
    assert kvmpass_guest.run(["touch", "/tmp/was-here"]).returncode == 0


def test_the_next_test_has_the_same_guest(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-e", "/tmp/was-here"]).returncode == 0


@pytest.mark.guest(devices=("nvme",), memory="256M", may_die=True)
def test_one_ends_its_guest(kvmpass_guest: Session) -> None:
    with pytest.raises(Exception, match="panicked"):
        kvmpass_guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"], timeout=100)


def test_then_there_is_a_new_one(kvmpass_guest: Session) -> None:
    assert kvmpass_guest.run(["test", "-e", "/tmp/was-here"]).returncode == 1
