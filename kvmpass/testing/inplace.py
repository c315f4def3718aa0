"""Marked tests that run in this process: on real hardware, or inside the lab."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvmpass.testing.fixtures import refuse_destruction
from kvmpass.testing.profiles import Requirement, profiles
from kvmpass.testing.state import Mode, State, missing_hardware

STRICT_SKIPS = "kvmpass_strict_skips"  # a setting in a project's pytest configuration
NEXT = (7, 3)  # what the lab's next kernel is
DUMP_AFTER = 15.0  # seconds after the limit: a test that still hangs is in a call that no signal interrupts


def time_limit(seconds: float, what: str) -> Generator[None, Any, Any]:
    """Fail a phase after ``seconds``, as the body of a pytest hook wrapper; no limit outside of the main thread.

    SIGALRM raises the failure at the next bytecode of the main thread; a blocking system call fails with EINTR. If
    the test still hangs, the stacks of all threads are written to stderr.
    """
    if threading.current_thread() is not threading.main_thread():
        return (yield)

    def expired(number: int, frame: FrameType | None) -> None:
        if threading.active_count() > 1:  # the main thread's own stack is in the report
            faulthandler.dump_traceback(stderr, all_threads=True)
        pytest.fail(f"{what} took longer than {seconds:g} s")

    stderr = sys.__stderr__ or sys.stderr
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + DUMP_AFTER, file=stderr)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


class InPlace:
    """Skips tests that this hardware cannot run; inside the lab turns skips into failures if the project wants it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.state = State.of(config)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Check the hardware. Raises ``UsageError`` if marked tests cannot run on it."""
        if self.state.mode is not Mode.HARDWARE or self.config.option.collectonly:
            return
        if any(Requirement.of(item) for item in session.items):
            missing = missing_hardware(self.state.roles)
            if missing:
                raise pytest.UsageError(
                    f"KVMPASS_TEST_<ROLE> requests real hardware, but {missing}; unset it to use the emulated host"
                )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a marked test that needs an emulated host, iommufd, or leave to destroy data."""
        requirement = Requirement.of(item)
        if requirement is None or self.state.mode is not Mode.HARDWARE:
            return
        profile = profiles(self.config).get(requirement.profile)
        if profile is not None and profile.lab_only:
            pytest.skip(f"the profile {requirement.profile!r} is for the emulated host only: unset KVMPASS_TEST_…")
        if requirement.kernel in ("full", "next") and not hardware_has_iommufd():
            pytest.skip("/dev/iommu is missing: the test needs a kernel with CONFIG_IOMMUFD")
        if requirement.kernel == "next" and release(os.uname().release) < NEXT:
            pytest.skip(f"the test needs Linux {NEXT[0]}.{NEXT[1]} or later: boot such a kernel")
        if item.get_closest_marker("destructive"):
            refuse_destruction(self.config)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Report a skip inside the lab as a failure (``kvmpass_strict_skips``)."""
        report = yield
        strict = self.state.mode is Mode.LAB and self.config.getini(STRICT_SKIPS)
        if strict and report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            report.outcome = "failed"
            report.longrepr = (
                f"{reason.removeprefix('Skipped: ')}\nA skip inside the emulated host is a failure ({STRICT_SKIPS})."
            )
        return report


class TimeLimit:
    """Limits the time of each phase of a marked test."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Limit the setup."""
        return (yield from self.limit(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Limit the call."""
        return (yield from self.limit(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Limit the teardown."""
        return (yield from self.limit(item, "teardown"))

    def limit(self, item: pytest.Item, phase: str) -> Generator[None, Any, Any]:
        """Apply the marker's timeout to a phase, multiplied for parallel hosts."""
        requirement = Requirement.of(item)
        if requirement is None:
            return (yield)
        seconds = requirement.timeout * State.of(item.config).slowdown
        return (yield from time_limit(seconds, f"{phase} of {item.name}"))


def release(text: str) -> tuple[int, int]:
    """Return the first two numbers of what ``uname -r`` prints."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def hardware_has_iommufd() -> bool:
    """Whether the running kernel offers iommufd."""
    return Path("/dev/iommu").exists()
