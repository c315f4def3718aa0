"""The pytest outside: boots a lab for each profile, and reports the events from inside as its own."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from kvmpass.testing import capacity
from kvmpass.testing.events import replay, unpack_report
from kvmpass.testing.hosts import HostRun, HostScheduler, TestRecord
from kvmpass.testing.profiles import Profile, Requirement, profiles
from kvmpass.testing.session import SPARES, Failure, HostSpec, LabSession, temporary_directory

POLL = 0.05
XDIST_OUTPUT = "kvmpass_hosts"
MIN_PART = 40.0  # expected seconds of tests that are worth the boot of a further host of the same kind


def expected(items: Iterable[pytest.Item]) -> float:
    """Return the expected duration of marked tests, in seconds."""
    return sum(requirement.duration for item in items if (requirement := Requirement.of(item)))


def split(plans: Mapping[HostSpec, list[pytest.Item]], jobs: int) -> dict[HostSpec, list[pytest.Item]]:
    """Divide the tests of long plans among several hosts, by file, so that all hosts end at about the same time.

    The longest come first: the last ones to start should be short. Otherwise the order is kept.
    """
    if jobs == 1:
        return dict(plans)
    total = sum(map(expected, plans.values()))
    divided: dict[HostSpec, list[pytest.Item]] = {}
    for spec, items in plans.items():
        # A third of what each job has to do: the estimate is rough, and small parts even it out.
        seconds = expected(items)
        parts = partition(items, min(round(3 * jobs * seconds / total), int(seconds // MIN_PART)))
        for number, part in enumerate(parts, start=1):
            name = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
            divided[replace(spec, part=name)] = part
    return dict(sorted(divided.items(), key=lambda plan: -expected(plan[1])))


def partition(items: list[pytest.Item], count: int) -> list[list[pytest.Item]]:
    """Divide tests into at most ``count`` parts of about the same expected duration; files are not divided."""
    parts: list[list[pytest.Item]] = [[]]
    total, seconds = expected(items), 0.0
    for _, group in itertools.groupby(items, key=lambda item: item.path):
        if len(parts) < count and seconds >= total * len(parts) / count:
            parts.append([])
        tests = list(group)
        parts[-1] += tests
        seconds += expected(tests)
    return parts


def unavailable_kernel(name: str) -> str | None:
    """Return why a kernel is unavailable, with the remedy; ``None`` if it is available."""
    from kvmpass.lab import kernels

    recipe = kernels.RECIPES.get(name)
    if recipe is None or recipe.available:
        return None
    return (
        f"needs the {name} kernel ({recipe.about}), which has not been built: `{recipe.command}` builds it, "
        f"{recipe.variable}=FILE names a built one"
    )


def unavailable_qemu(name: str) -> str | None:
    """Return why a QEMU is unavailable, with the remedy; ``None`` if it is available."""
    from kvmpass.lab import qemu

    if name != "modern" or qemu.modern_root().is_dir():
        return None
    return "needs the modern QEMU, which is not in the cache: `kvmpass lab qemu` fetches it"


class Outer:
    """Runs marked tests in emulated hosts, instead of pytest's own protocol.

    Synchronization: main thread only.
    """

    def __init__(self, config: pytest.Config, kernel: str, qemu: str, jobs: int) -> None:
        self.config = config
        self.kernel = kernel
        """The run's kernel: ``stock``, ``full``, ``next`` or a path."""
        self.qemu = qemu
        """The run's QEMU: ``system``, ``modern`` or a path."""
        self.worker = hasattr(config, "workerinput")  # of pytest-xdist
        self.jobs = 1 if self.worker else jobs
        """How many hosts may run in parallel."""
        self.plans: dict[HostSpec, list[pytest.Item]] = {}
        self.specs: dict[str, HostSpec] = {}
        self.skips: dict[str, str] = {}
        self.runs: dict[HostSpec, HostRun] = {}
        self.hosts: HostScheduler | None = None
        self.other_lines: list[str] = []  # of earlier hosts of an xdist worker, and of all its workers

    def spec_for(self, requirement: Requirement, known: dict[str, Profile]) -> HostSpec | str:
        """Return the host that a test needs, or why it is unavailable. Raises ``UsageError``: unknown profile."""
        profile = known.get(requirement.profile)
        if profile is None:
            raise pytest.UsageError(f"unknown profile {requirement.profile!r}; known: {', '.join(sorted(known))}")
        kernel = requirement.kernel or profile.kernel or self.kernel
        emulator = requirement.qemu or profile.qemu
        if kernel == "full" and self.kernel not in ("stock", "full"):
            kernel = self.kernel  # the user's own kernel replaces the full one, and so does the next one
        if kernel == "next" and emulator == "system":
            return "needs the system QEMU, which cannot run the next kernel's guests: --lab-kernel=full makes it run"
        if emulator is None:
            emulator = "modern" if kernel == "next" and self.qemu == "system" else self.qemu
        # The run's own choice is not checked: if it is missing, the boot fails with the reason.
        unavailable = kernel != self.kernel and unavailable_kernel(kernel)
        unavailable = unavailable or (emulator != self.qemu and unavailable_qemu(emulator))
        return unavailable or HostSpec(requirement.profile, kernel, emulator)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Move marked tests to the end, grouped by host; otherwise the order is kept.

        A test that already has the mark ``skip`` (for example from a ``conftest.py`` that could not make what the
        test needs) is skipped outside, without a host.
        """
        known = profiles(self.config)
        here: list[pytest.Item] = []
        plans: defaultdict[HostSpec, list[pytest.Item]] = defaultdict(list)
        for item in items:
            requirement = Requirement.of(item) if item.get_closest_marker("skip") is None else None
            spec = self.spec_for(requirement, known) if requirement else None
            if isinstance(spec, HostSpec):
                plans[spec].append(item)
                continue
            if spec:
                self.skips[item.nodeid] = spec
            here.append(item)
        self.plans = split(plans, self.jobs)
        self.specs = {item.nodeid: spec for spec, group in self.plans.items() for item in group}
        items[:] = here + [item for group in self.plans.values() for item in group]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a test whose kernel or QEMU is unavailable."""
        if item.nodeid in self.skips:
            pytest.skip(self.skips[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Wait for the record of a marked test, and report it."""
        spec = self.specs.get(item.nodeid)
        if spec is None:
            self.poll_in_background()
            return None
        if self.worker and (spec not in self.runs or item.nodeid not in self.runs[spec].records):
            # A worker gets its tests one by one, in any order.
            if self.hosts is not None:
                self.hosts.close()
                self.other_lines += self.lines
            self.runs.clear()
            self.hosts = self.start({spec: self.plans[spec][self.plans[spec].index(item) :]})
        elif self.hosts is None:
            self.hosts = self.start(self.plans)
        self.hosts.jobs = self.jobs
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        record = self.runs[spec].records[item.nodeid]
        while not record.done:
            self.poll()
        self.replay(item, record)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        while nextitem is None and not self.hosts.ended and not self.hosts.pending:
            self.poll()
        return True

    def poll_in_background(self) -> None:
        """Poll while tests run that need no host: with one job less, because these tests keep a CPU busy."""
        if self.worker or self.jobs == 1 or not self.plans:
            return
        if self.hosts is None:
            self.hosts = self.start(self.plans)
        self.hosts.jobs = self.jobs - 1
        self.hosts.poll()

    def poll(self) -> None:
        """Poll the hosts, and wait a moment if nothing has happened."""
        assert self.hosts is not None
        if not self.hosts.poll():
            time.sleep(POLL)

    def start(self, plans: Mapping[HostSpec, list[pytest.Item]]) -> HostScheduler:
        """Return a scheduler for these plans; it starts the first hosts when it is polled."""
        known = profiles(self.config)
        slowdown = capacity.slowdown(min(self.jobs, len(plans)), capacity.cpus())
        spares = int(self.config.getini(SPARES))
        temporary = temporary_directory(self.config)
        needs: dict[HostRun, int] = {}
        for spec, items in plans.items():
            profile = known[spec.profile]
            number = sum(other.profile == spec.profile for other in self.runs) + 1
            directory = temporary / f"{spec.profile}{number if number > 1 else ''}"
            start = functools.partial(LabSession, self.config, spec, profile, directory, slowdown)
            run = self.runs[spec] = HostRun(start, items, spares, slowdown)
            needs[run] = capacity.size(profile.memory) + capacity.OVERHEAD
        return HostScheduler(needs, self.jobs, capacity.memory())

    def replay(self, item: pytest.Item, record: TestRecord) -> None:
        """Report the events of a test to this pytest, and each host that died during it."""
        for text in record.deaths:
            item.warn(pytest.PytestWarning(text))
        for event in record.events:
            if event["event"] == "report":
                item.ihook.pytest_runtest_logreport(report=unpack_report(self.config, event["data"]))
            else:
                replay(self.config, event)
        if record.failure is not None:
            self.fail(item, record.failure)

    def fail(self, item: pytest.Item, failure: Failure) -> None:
        """Report the failure of a test that has no report of its own, and the end of its teardown."""
        failed = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed",
            longrepr=failure.text,
            when=failure.phase,
            sections=failure.sections,
        )
        item.ihook.pytest_runtest_logreport(report=failed)
        if failure.phase != "teardown":
            passed = copy.copy(failed)
            passed.when, passed.outcome, passed.longrepr, passed.sections = "teardown", "passed", None, []
            item.ihook.pytest_runtest_logreport(report=passed)

    def pytest_sessionfinish(self) -> None:
        """End the hosts that still run, after -x or Ctrl-C, and report their last events."""
        if self.hosts is not None:
            self.hosts.close()
        for run in self.runs.values():
            for event in run.late_events:
                replay(self.config, event)
        if self.worker:
            self.config.workeroutput[XDIST_OUTPUT] = [*self.other_lines, *self.lines]  # type: ignore[attr-defined]

    @property
    def lines(self) -> list[str]:
        """A line about each host of this process, for the summary."""
        return [f"{spec}: {line}" for spec, run in self.runs.items() for line in run.lines]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the lines of a pytest-xdist worker that has ended."""
        self.other_lines += getattr(node, "workeroutput", {}).get(XDIST_OUTPUT, ())  # one that crashed has none

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a line about each host."""
        lines = [*self.lines, *self.other_lines]
        if lines:
            terminalreporter.section("emulated hosts")
            for line in lines:
                terminalreporter.write_line(line)
