"""The emulated hosts of a run, in parallel: when each starts, and what happened to each of their tests."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field

import pytest

from kvmpass._dataclass import dataclass, replace
from kvmpass.errors import KvmpassError
from kvmpass.testing.events import Event
from kvmpass.testing.profiles import Requirement
from kvmpass.testing.session import Failure, LabSession, Phase, error_text

# Seconds without any event: until the tests are collected inside; beyond a phase's own limit; after the last test.
BOOT_LIMIT = 900.0  # a first boot downloads its kernel
GRACE = 90.0
END_LIMIT = 90.0
# Seconds without any CPU time for an emulator: the timers of an idle host use 0.03 s in 10 s.
STALL_LIMIT = 60.0

Start = Callable[[list[pytest.Item]], LabSession]
"""Starts an emulated host that runs these tests, in their order."""


@dataclass(slots=True)
class TestRecord:
    """What happened to one test, as far as it is known."""

    events: list[Event] = field(default_factory=list)
    """Its events from inside, in order."""
    deaths: list[str] = field(default_factory=list)
    """A description of each host that died during the test and was replaced."""
    failure: Failure | None = None
    """Why the test has no reports of its own, or not all of them."""
    done: bool = False
    """Whether the record is complete."""

    @property
    def phase(self) -> Phase:
        """The next phase, according to the reports so far."""
        reported = {event["data"]["when"] for event in self.events if event["event"] == "report"}
        return "teardown" if reported - {"setup"} else "call" if reported else "setup"


class CpuWatch:
    """How long an emulator has used no CPU time.

    Each update adds at most a second: while this process is suspended, so is the emulator.
    """

    def __init__(self) -> None:
        self.stalled = 0.0
        """Seconds without CPU time, up to the last update."""
        self._cpu_time: float | None = None
        self._updated = time.monotonic()

    def update(self, cpu_time: float | None) -> None:
        """Take the CPU time used until now, in seconds; ``None`` (unknown) is no stall."""
        now = time.monotonic()
        if cpu_time is None or cpu_time != self._cpu_time:
            self.stalled = 0.0
        else:
            self.stalled += min(now - self._updated, 1.0)
        self._cpu_time, self._updated = cpu_time, now


class HostRun:
    """Tests that share an emulated host, and the host that runs them; one that dies is replaced.

    Synchronization: main thread only, which polls. Only ending a host blocks.
    """

    def __init__(self, start: Start, items: Sequence[pytest.Item], spares: int = 0, slowdown: float = 1.0) -> None:
        self.records = {item.nodeid: TestRecord() for item in items}
        """The record of each test, by node ID."""
        self.late_events: list[Event] = []
        """Events after the end of the last test."""
        self.lines: list[str] = []
        """A line about each host, for the summary."""
        self.started = False
        """Whether the first host has been started."""
        self.ended = False
        """Whether each test has its record, and no host is left."""
        self._start = start
        self._pending = deque(items)
        self._spares = spares
        self._slowdown = slowdown
        self._session: LabSession | None = None
        self._last_event = 0.0
        self._watch = CpuWatch()

    @property
    def pending(self) -> bool:
        """Whether a test has no complete record yet."""
        return bool(self._pending)

    def start(self) -> None:
        """Start the first host; returns at once."""
        self.started = True
        self._boot()

    def _boot(self) -> None:
        self._last_event = time.monotonic()
        self._watch = CpuWatch()
        try:
            self._session = self._start(list(self._pending))
        except (KvmpassError, OSError) as error:
            text = f"the emulated host could not be started: {error_text(error)}"
            self._fail_pending(lambda: text)
            self.ended = True

    def poll(self) -> bool:
        """Handle what has happened since the last call; returns whether anything has."""
        session = self._session
        if session is None:
            return False
        alive = session.running  # before the events: what was written before the end is still read
        events = session.poll()
        for event in events:
            self._handle(session, event)
        if events:
            self._last_event = time.monotonic()
            return True
        self._watch.update(session.cpu_time())
        stalled = self._watch.stalled > STALL_LIMIT
        silence, limit = time.monotonic() - self._last_event, self._silence_limit(session)
        if not alive or stalled or silence > limit or (session.finished and self._pending):
            if self._pending:
                reason = f"used no CPU time for {STALL_LIMIT:g} s" if stalled else f"was silent for {limit:.0f} s"
                self._died(session, reason)
            else:
                self._close(session)
                self.ended = True
            return True
        return False

    def _silence_limit(self, session: LabSession) -> float:
        if not self._pending:
            return END_LIMIT * self._slowdown
        if session.collected is None:
            return BOOT_LIMIT * self._slowdown
        requirement = Requirement.of(self._pending[0])
        assert requirement is not None
        return (requirement.timeout + GRACE) * self._slowdown

    def _handle(self, session: LabSession, event: Event) -> None:
        match event["event"]:
            case "report":
                record = self.records.get(event["data"]["nodeid"])
                if record is not None:
                    record.events.append(event)
            case "warning" | "suite-property" | "xml-attribute":
                (self.records[self._pending[0].nodeid].events if self._pending else self.late_events).append(event)
            case "finish":
                self._complete(event["id"])
                self._fail_missing(session)
            case "collected":
                self._fail_missing(session)

    def _complete(self, nodeid: str, failure: Failure | None = None) -> None:
        """Complete the record of a test, if it is the one that runs."""
        if self._pending and self._pending[0].nodeid == nodeid:
            self._pending.popleft()
            record = self.records[nodeid]
            record.failure, record.done = failure, True

    def _fail_missing(self, session: LabSession) -> None:
        """Fail the next tests that were not collected inside."""
        assert session.collected is not None
        while self._pending and (nodeid := self._pending[0].nodeid) not in session.collected:
            self._complete(nodeid, Failure(session.missing_reason(nodeid)))

    def _died(self, session: LabSession, reason: str) -> None:
        nodeid = self._pending[0].nodeid
        record = self.records[nodeid]
        reached = session.collected is not None
        death = session.end_dead(nodeid if reached else None, reason)
        if self._spares:
            self._spares -= 1
            record.deaths.append(f"{death.text}\nIt was replaced.\n{death.evidence}")
            record.events.clear()
            self._close(session, ", REPLACED")
            self._boot()
            return
        if reached:
            self._complete(nodeid, replace(death, phase=record.phase))
        self._fail_pending(session.not_run_reason)
        self._close(session)
        self.ended = True

    def _fail_pending(self, reason: Callable[[], str]) -> None:
        while self._pending:
            self._complete(self._pending[0].nodeid, Failure(reason()))

    def _close(self, session: LabSession, remark: str = "") -> None:
        self.lines.append(session.close() + remark)
        self._session = None

    def request_stop(self) -> None:
        """End the host, without waiting for it."""
        if self._session is not None:
            self._session.request_stop()

    def close(self) -> None:
        """End the host if it still runs, and wait for it."""
        if self._session is not None:
            self._close(self._session)
        self.ended = True


class HostScheduler:
    """Starts runs in their order, in parallel as far as the number of jobs and the memory allow, but at least one.

    ``needs``: the bytes of memory that the host of each run takes.
    """

    def __init__(self, needs: Mapping[HostRun, int], jobs: int, memory: int) -> None:
        self._needs = dict(needs)
        self.jobs = jobs
        """How many hosts may run in parallel; may change at any time."""
        self._memory = memory

    def poll(self) -> bool:
        """Poll each run, and start those that there is room for; returns whether anything has happened."""
        progress = sum(run.poll() for run in self._needs) > 0
        for run, need in self._needs.items():
            running = [other for other in self._needs if other.started and not other.ended]
            used = sum(self._needs[other] for other in running)
            if not run.started and (not running or (len(running) < self.jobs and used + need <= self._memory)):
                run.start()
                progress = True
        return progress

    @property
    def ended(self) -> bool:
        """Whether all runs have ended."""
        return all(run.ended for run in self._needs)

    @property
    def pending(self) -> bool:
        """Whether a test has no complete record yet."""
        return any(run.pending for run in self._needs)

    def close(self) -> None:
        """End all hosts that still run."""
        for run in self._needs:
            run.request_stop()
        for run in self._needs:
            run.close()
