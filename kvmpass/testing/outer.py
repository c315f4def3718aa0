"""The outside: boots a lab for each profile, follows the events from inside, replays them as this pytest's own."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from kvmpass.testing.events import Event, replay_warning, unpack_report
from kvmpass.testing.profiles import Profile, Requirement, profiles
from kvmpass.testing.session import SPARES, LabSession

# Seconds without any event: until the tests are collected inside; beyond a phase's own limit; after the last test.
BOOT_LIMIT = 900.0  # a first boot downloads its kernel
GRACE = 90.0
END_LIMIT = 90.0


@dataclass(frozen=True, slots=True)
class Boot:
    """What one boot of a lab has: tests that agree on it share it."""

    profile: str
    kernel: str
    qemu: str

    def __str__(self) -> str:
        return f"{self.profile} ({self.kernel} kernel, {self.qemu} QEMU)"


def lacks_kernel(name: str) -> str | None:
    """Why no emulated host with that kernel can be had here, and what makes one; ``None`` if it can."""
    from kvmpass.lab import kernels  # late: a run without marked tests has no use for it

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

    def __init__(self, config: pytest.Config, kernel: str, qemu: str) -> None:
        self.config = config
        self.kernel = kernel
        self.qemu = qemu
        self.plans: dict[Boot, list[pytest.Item]] = {}
        self.skips: dict[str, str] = {}
        self.current: tuple[Boot, LabSession] | None = None
        self.log: list[str] = []
        self.spares: dict[Boot, int] = {}

    def boot_for(self, requirement: Requirement, known: dict[str, Profile]) -> Boot | str:
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
        return Boot(requirement.profile, kernel, emulator)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marked tests go last, those of one boot together; the order is otherwise kept."""
        known = profiles(self.config)
        here: list[pytest.Item] = []
        plans: defaultdict[Boot, list[pytest.Item]] = defaultdict(list)
        for item in items:
            requirement = Requirement.of(item)
            boot = self.boot_for(requirement, known) if requirement else None
            if isinstance(boot, Boot):
                plans[boot].append(item)
                continue
            if boot:
                self.skips[item.nodeid] = boot
            here.append(item)
        self.plans = dict(plans)
        items[:] = here + [item for group in plans.values() for item in group]

    def boot_of(self, item: pytest.Item) -> Boot | None:
        return next((boot for boot, items in self.plans.items() if item in items), None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid in self.skips:
            pytest.skip(self.skips[item.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        boot = self.boot_of(item)
        if boot is None:
            return None
        if self.current is None or self.current[0] != boot:
            self.end()
            plan = self.plans[boot]
            self.current = boot, self.start(boot, plan[plan.index(item) :])
        session = self.current[1]
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self.replay(session, item)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if nextitem is None or self.boot_of(nextitem) != boot:
            self.end()
        return True

    def start(self, boot: Boot, items: list[pytest.Item]) -> LabSession:
        profile = profiles(self.config)[boot.profile]
        return LabSession.boot(self.config, boot.profile, profile, boot.kernel, boot.qemu, items)

    # --- one test

    def replay(self, session: LabSession, item: pytest.Item) -> None:
        """Wait for the reports of ``item`` and hand each on as it comes."""
        requirement = Requirement.of(item)
        assert requirement is not None
        if session.collected is None and session.death is None:
            self.await_collection(session)
            if session.death is not None and (spare := self.replace(item, session)):
                self.replay(spare, item)
                return
        phase = "setup"
        if session.collected is not None and item.nodeid not in session.collected:
            self.fail(item, phase, session.why_missing(item.nodeid))
            return
        if session.death is not None:
            self.fail(item, phase, session.not_run())
            return
        limit = requirement.timeout + GRACE
        deadline = time.monotonic() + limit
        while True:
            event = session.next(deadline)
            if event is None:
                died = session.died(item.nodeid, limit)
                if spare := self.replace(item, session):
                    self.replay(spare, item)
                    return
                self.fail(item, phase, died.text, died.sections)
                return
            deadline = time.monotonic() + limit
            if event["event"] == "report":
                report = unpack_report(self.config, event["data"])
                phase = {"setup": "call"}.get(report.when, "teardown")
                item.ihook.pytest_runtest_logreport(report=report)
            elif event["event"] == "finish":
                return
            else:
                self.other(event)

    def replace(self, item: pytest.Item, session: LabSession) -> LabSession | None:
        """Another emulated host for ``item`` and what comes after it, where the setting allows one more.

        An emulator has faults of its own: what they end is run anew, and never silently.
        """
        assert self.current is not None and session.death is not None
        boot = self.current[0]
        left = self.spares.setdefault(boot, int(self.config.getini(SPARES)))
        if left == 0:
            return None
        self.spares[boot] = left - 1
        evidence = "\n".join(f"--- {title}\n{content}" for title, content in session.death.sections)
        item.warn(pytest.PytestWarning(f"{session.death.text}\nIt was replaced.\n{evidence}"))
        self.log.append(f"{boot}: {session.close(0)}, REPLACED")
        plan = self.plans[boot]
        self.current = boot, self.start(boot, plan[plan.index(item) :])
        return self.current[1]

    def await_collection(self, session: LabSession) -> None:
        deadline = time.monotonic() + BOOT_LIMIT
        while session.collected is None:
            event = session.next(deadline)
            if event is None:
                session.died(None, BOOT_LIMIT)
                return
            self.other(event)

    def other(self, event: Event) -> None:
        if event["event"] == "warning":
            replay_warning(self.config, event)

    def fail(self, item: pytest.Item, phase: str, text: str, sections: Iterable[tuple[str, str]] = ()) -> None:
        """Report a test that could not speak for itself, and that it is over."""
        now = time.time()
        for when, outcome in ((phase, "failed"), ("teardown", "passed")):
            if when == outcome == "teardown":
                continue
            report = pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="failed" if outcome == "failed" else "passed",
                longrepr=text if outcome == "failed" else None,
                when="setup" if when == "setup" else "call" if when == "call" else "teardown",
                sections=sections if outcome == "failed" else (),
                start=now,
                stop=now,
            )
            item.ihook.pytest_runtest_logreport(report=report)
            if when == "teardown":
                return

    # --- the lab's end

    def end(self) -> None:
        """Wait until the lab has powered itself off; end it if it does not."""
        if self.current is None:
            return
        boot, session = self.current
        self.current = None
        deadline = time.monotonic() + END_LIMIT
        while session.death is None:
            event = session.next(deadline)
            if event is None or event["event"] == "end":
                break
            self.other(event)
        self.log.append(f"{boot}: {session.close(END_LIMIT if session.death is None else 0)}")

    def pytest_sessionfinish(self) -> None:
        """After -x or Ctrl-C a lab may still run."""
        if self.current is not None:
            boot, session = self.current
            self.current = None
            self.log.append(f"{boot}: {session.close(0)}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.log:
            terminalreporter.section("emulated hosts")
            for line in self.log:
                terminalreporter.write_line(line)
