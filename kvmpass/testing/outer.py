"""The outside: boots a lab for each profile, follows the events from inside, replays them as this pytest's own."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from kvmpass.testing import capacity
from kvmpass.testing.events import replay, unpack_report
from kvmpass.testing.hosts import HostRun, Hosts, Record
from kvmpass.testing.profiles import Profile, Requirement, profiles
from kvmpass.testing.session import SPARES, Failure, HostSpec, LabSession, temporary_directory

POLL = 0.05
XDIST_OUTPUT = "kvmpass_hosts"
SHARE = 60.0  # expected seconds at least, for a host of their own beside another one of the same kind


def expected(items: Iterable[pytest.Item]) -> float:
    """Expected duration of marked tests, in seconds."""
    return sum(requirement.duration for item in items if (requirement := Requirement.of(item)))


def split(plans: Mapping[HostSpec, list[pytest.Item]], jobs: int) -> dict[HostSpec, list[pytest.Item]]:
    """Give what would keep one host busy when the others have long ended several hosts, file by file.

    The longest come first: the last to start should be short. The order is otherwise kept.
    """
    if jobs == 1:
        return dict(plans)
    total = sum(map(expected, plans.values()))
    done: dict[HostSpec, list[pytest.Item]] = {}
    for boot, items in plans.items():
        # Parts of a third of a host's share leave the others something to even out.
        seconds = expected(items)
        parts = partition(items, min(round(3 * jobs * seconds / total), int(seconds // SHARE)))
        for number, part in enumerate(parts, start=1):
            name = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
            done[replace(boot, part=name)] = part
    return dict(sorted(done.items(), key=lambda plan: -expected(plan[1])))


def partition(items: list[pytest.Item], count: int) -> list[list[pytest.Item]]:
    """At most ``count`` parts, about as long, one after the other; the tests of a file stay together."""
    parts: list[list[pytest.Item]] = [[]]
    total, seconds = expected(items), 0.0
    for _, group in itertools.groupby(items, key=lambda item: item.path):
        if len(parts) < count and seconds >= total * len(parts) / count:
            parts.append([])
        tests = list(group)
        parts[-1] += tests
        seconds += expected(tests)
    return parts


def lacks_kernel(name: str) -> str | None:
    """Why no emulated host with that kernel can be had here, and what makes one; ``None`` if it can."""
    from kvmpass.lab import kernels

    if name != "full" or os.environ.get(kernels.FULL_VARIABLE) or kernels.cached(kernels.full_root(), "full"):
        return None
    return (
        "needs the full kernel (iommufd), which has not been built: `kvmpass lab kernel` builds it, "
        f"{kernels.FULL_VARIABLE}=FILE names a built one"
    )


def lacks_qemu(name: str) -> str | None:
    """As ``lacks_kernel``, for a QEMU."""
    from kvmpass.lab import qemu

    if name != "modern" or qemu.modern_root().is_dir():
        return None
    return "needs the modern QEMU, which is not in the cache: `kvmpass lab qemu` fetches it"


class Outer:
    """Takes over the protocol of marked tests."""

    def __init__(self, config: pytest.Config, kernel: str, qemu: str, jobs: int) -> None:
        self.config = config
        self.kernel = kernel
        self.qemu = qemu
        self.worker = hasattr(config, "workerinput")  # of pytest-xdist
        self.jobs = 1 if self.worker else jobs
        self.plans: dict[HostSpec, list[pytest.Item]] = {}
        self.boots: dict[str, HostSpec] = {}
        self.skips: dict[str, str] = {}
        self.runs: dict[HostSpec, HostRun] = {}
        self.hosts: Hosts | None = None
        self.elsewhere: list[str] = []

    def boot_for(self, requirement: Requirement, known: dict[str, Profile]) -> HostSpec | str:
        """The boot a test needs, or why this run cannot have it."""
        profile = known.get(requirement.profile)
        if profile is None:
            raise pytest.UsageError(f"no profile {requirement.profile!r}; there are {', '.join(sorted(known))}")
        kernel = requirement.kernel or profile.kernel or self.kernel
        emulator = requirement.qemu or profile.qemu or self.qemu
        if kernel == "full" and self.kernel not in ("stock", "full"):
            kernel = self.kernel  # a kernel of one's own stands in for the full one
        # What the run itself chose is not asked for: if it is missing the boot fails, and tells.
        lacks = (kernel != self.kernel and lacks_kernel(kernel)) or (emulator != self.qemu and lacks_qemu(emulator))
        if lacks:
            return lacks
        return HostSpec(requirement.profile, kernel, emulator)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marked tests go last, those of one boot together; the order is otherwise kept.

        One that has the mark ``skip`` by now (of a ``conftest.py`` that could not make what it needs, for one) is
        skipped here: no host is booted for it, and its reason is that of the machine outside.
        """
        known = profiles(self.config)
        here: list[pytest.Item] = []
        plans: defaultdict[HostSpec, list[pytest.Item]] = defaultdict(list)
        for item in items:
            requirement = Requirement.of(item) if item.get_closest_marker("skip") is None else None
            boot = self.boot_for(requirement, known) if requirement else None
            if isinstance(boot, HostSpec):
                plans[boot].append(item)
                continue
            if boot:
                self.skips[item.nodeid] = boot
            here.append(item)
        self.plans = split(plans, self.jobs)
        self.boots = {item.nodeid: boot for boot, group in self.plans.items() for item in group}
        items[:] = here + [item for group in self.plans.values() for item in group]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid in self.skips:
            pytest.skip(self.skips[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        boot = self.boots.get(item.nodeid)
        if boot is None:
            self.look_after_hosts()
            return None
        if self.worker and (boot not in self.runs or item.nodeid not in self.runs[boot].records):
            # It is told from one test to the next what to do, in any order.
            if self.hosts is not None:
                self.hosts.close()
                self.elsewhere += self.lines
            self.runs.clear()
            self.hosts = self.start({boot: self.plans[boot][self.plans[boot].index(item) :]})
        elif self.hosts is None:
            self.hosts = self.start(self.plans)
        self.hosts.jobs = self.jobs
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        record = self.runs[boot].records[item.nodeid]
        while not record.over:
            self.poll()
        self.replay(item, record)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        while nextitem is None and not self.hosts.over and not self.hosts.left:
            self.poll()
        return True

    def look_after_hosts(self) -> None:
        """Beside the tests that need no host run all hosts but one: they keep a CPU busy, too."""
        if self.worker or self.jobs == 1 or not self.plans:
            return
        if self.hosts is None:
            self.hosts = self.start(self.plans)
        self.hosts.jobs = self.jobs - 1
        self.hosts.poll()

    def poll(self) -> None:
        assert self.hosts is not None
        if not self.hosts.poll():
            time.sleep(POLL)

    def start(self, plans: Mapping[HostSpec, list[pytest.Item]]) -> Hosts:
        """Make the run of each boot; the first of them start with the next look at them."""
        known = profiles(self.config)
        slowdown = capacity.slowdown(min(self.jobs, len(plans)), capacity.cpus())
        spares = int(self.config.getini(SPARES))
        temporary = temporary_directory(self.config)
        needs: dict[HostRun, int] = {}
        for boot, items in plans.items():
            profile = known[boot.profile]
            number = sum(other.profile == boot.profile for other in self.runs) + 1
            directory = temporary / f"{boot.profile}{number if number > 1 else ''}"
            start = functools.partial(LabSession.boot, self.config, boot, profile, directory, slowdown)
            run = self.runs[boot] = HostRun(start, items, spares, slowdown)
            needs[run] = capacity.size(profile.memory) + capacity.OVERHEAD
        return Hosts(needs, self.jobs, capacity.memory())

    # --- one test

    def replay(self, item: pytest.Item, record: Record) -> None:
        """Tell this pytest what became of a test inside."""
        for text in record.deaths:  # never silently
            item.warn(pytest.PytestWarning(text))
        for event in record.events:
            if event["event"] == "report":
                item.ihook.pytest_runtest_logreport(report=unpack_report(self.config, event["data"]))
            else:
                replay(self.config, event)
        if record.failure is not None:
            self.fail(item, record.failure)

    def fail(self, item: pytest.Item, failure: Failure) -> None:
        """Report a test that could not speak for itself, and that it is over."""
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

    # --- the end

    def pytest_sessionfinish(self) -> None:
        """After -x or Ctrl-C hosts may still run."""
        if self.hosts is not None:
            self.hosts.close()
        for run in self.runs.values():
            for event in run.late:
                replay(self.config, event)

        if self.worker:
            self.config.workeroutput[XDIST_OUTPUT] = [*self.elsewhere, *self.lines]  # type: ignore[attr-defined]

    @property
    def lines(self) -> list[str]:
        return [f"{boot}: {line}" for boot, run in self.runs.items() for line in run.lines]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended."""
        self.elsewhere += getattr(node, "workeroutput", {}).get(XDIST_OUTPUT, ())  # one that crashed has none

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [*self.lines, *self.elsewhere]
        if lines:
            terminalreporter.section("emulated hosts")
            for line in lines:
                terminalreporter.write_line(line)
