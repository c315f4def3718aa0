"""Marked tests that run in this very process: on real hardware, or inside the lab."""

from __future__ import annotations

import faulthandler
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
from kvmpass.testing.state import Mode, State, hardware_lacks

STRICT_SKIPS = "kvmpass_strict_skips"  # a setting in a project's pytest configuration
DUMP_AFTER = 15.0  # seconds after the limit: whoever still hangs then sits in a call that no signal ends


def time_limit(seconds: float, what: str) -> Generator[None, Any, Any]:
    """A pytest hook wrapper's body that fails the phase after ``seconds``. Main thread only.

    SIGALRM raises the failure at the next bytecode of the main thread; a system call that waits gets EINTR. Where
    that does not help the stacks of all threads go to stderr.
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
    """Skips what this host cannot do (hardware); lets nobody skip inside the lab where the project asks for that."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.state = State.of(config)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.state.mode is not Mode.HARDWARE or self.config.option.collectonly:
            return
        if any(Requirement.of(item) for item in session.items):
            lacks = hardware_lacks(self.state.roles)
            if lacks:
                raise pytest.UsageError(
                    f"KVMPASS_TEST_<ROLE> asks for real hardware, but {lacks}; unset it to use the emulated host"
                )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        requirement = Requirement.of(item)
        if requirement is None or self.state.mode is not Mode.HARDWARE:
            return
        profile = profiles(self.config).get(requirement.profile)
        if profile is not None and profile.lab_only:
            pytest.skip(f"the profile {requirement.profile!r} exists in the emulated host only: unset KVMPASS_TEST_…")
        if requirement.kernel == "full" and not hardware_has_iommufd():
            pytest.skip("/dev/iommu is missing: a kernel with CONFIG_IOMMUFD makes it run")
        if item.get_closest_marker("destructive"):
            refuse_destruction(self.config)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
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
    """Limits each phase of a marked test."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self.limit(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self.limit(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        return (yield from self.limit(item, "teardown"))

    def limit(self, item: pytest.Item, phase: str) -> Generator[None, Any, Any]:
        requirement = Requirement.of(item)
        if requirement is None:
            return (yield)
        seconds = requirement.timeout * State.of(item.config).slowdown
        return (yield from time_limit(seconds, f"{phase} of {item.name}"))


def hardware_has_iommufd() -> bool:
    """Whether the running kernel offers iommufd."""
    return Path("/dev/iommu").exists()
