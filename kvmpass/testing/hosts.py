"""The emulated hosts of a run, side by side: which of them starts when, and what each of their tests came to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from kvmpass.errors import KvmpassError
from kvmpass.testing.events import Event
from kvmpass.testing.profiles import Requirement
from kvmpass.testing.session import Failure, LabSession, Phase

# Seconds without any event: until the tests are collected inside; beyond a phase's own limit; after the last test.
BOOT_LIMIT = 900.0  # a first boot downloads its kernel
GRACE = 90.0
END_LIMIT = 90.0
# Seconds without any CPU time for an emulator: the timers of an idle host use 0.03 s in 10 s.
STALL_LIMIT = 60.0

Start = Callable[[list[pytest.Item]], LabSession]
"""Starts an emulated host that runs these tests, in their order."""


@dataclass(slots=True)
class Record:
    """What one test came to: events from inside, hosts that died under it and were replaced, why it has no end."""

    events: list[Event] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    failure: Failure | None = None
    over: bool = False

    @property
    def phase(self) -> Phase:
        """The phase that comes next, by the reports so far."""
        reported = {event["data"]["when"] for event in self.events if event["event"] == "report"}
        return "teardown" if reported - {"setup"} else "call" if reported else "setup"


class CpuWatch:
    """How long an emulator has used no CPU time.

    Each look adds at most a second: while this process is suspended, so is the emulator.
    """

    def __init__(self) -> None:
        self.stalled = 0.0
        """Seconds without CPU time, up to the last look."""
        self._cpu_time: float | None = None
        self._looked = time.monotonic()

    def look(self, cpu_time: float | None) -> None:
        """Take in the CPU time used until now, in seconds; ``None`` (unknown) is no stall."""
        now = time.monotonic()
        if cpu_time is None or cpu_time != self._cpu_time:
            self.stalled = 0.0
        else:
            self.stalled += min(now - self._looked, 1.0)
        self._cpu_time, self._looked = cpu_time, now


class HostRun:
    """Tests that share an emulated host: one host after another runs them, where those that die are replaced.

    Synchronization: for the main thread only, which polls; nothing here waits, except for hosts that are ended.
    """

    def __init__(self, start: Start, items: Sequence[pytest.Item], spares: int = 0, slowdown: float = 1.0) -> None:
        self.records = {item.nodeid: Record() for item in items}
        self.late: list[Event] = []
        """Events after the last test's end."""
        self.lines: list[str] = []
        """What became of each host."""
        self.started = False
        self.over = False
        """Whether every test has its record, and no host is left."""
        self._start = start
        self._left = deque(items)
        self._spares = spares
        self._slowdown = slowdown
        self._session: LabSession | None = None
        self._heard = 0.0
        self._watch = CpuWatch()

    @property
    def left(self) -> bool:
        """Whether a test has no record yet."""
        return bool(self._left)

    def start(self) -> None:
        """Start the first host; returns at once."""
        self.started = True
        self._boot()

    def _boot(self) -> None:
        self._heard = time.monotonic()
        self._watch = CpuWatch()
        try:
            self._session = self._start(list(self._left))
        except (KvmpassError, OSError) as error:
            hints = "".join(f"\n  hint: {note}" for note in getattr(error, "__notes__", ()))
            text = f"the emulated host could not be made: {type(error).__name__}: {error}{hints}"
            self._give_up(lambda: text)
            self.over = True

    def poll(self) -> bool:
        """Take in what has happened since the last call; returns whether anything has."""
        session = self._session
        if session is None:
            return False
        alive = session.running  # before the events: what was written before the end is still read
        events = session.poll()
        for event in events:
            self._take(session, event)
        if events:
            self._heard = time.monotonic()
            return True
        self._watch.look(session.cpu_time())
        stalled = self._watch.stalled > STALL_LIMIT
        silence, patience = time.monotonic() - self._heard, self._patience(session)
        if not alive or stalled or silence > patience or (session.finished and self._left):
            if self._left:
                reason = f"used no CPU time for {STALL_LIMIT:g} s" if stalled else f"was silent for {patience:.0f} s"
                self._died(session, reason)
            else:
                self._close(session)
                self.over = True
            return True
        return False

    def _patience(self, session: LabSession) -> float:
        if not self._left:
            return END_LIMIT * self._slowdown
        if session.collected is None:
            return BOOT_LIMIT * self._slowdown
        requirement = Requirement.of(self._left[0])
        assert requirement is not None
        return (requirement.timeout + GRACE) * self._slowdown

    def _take(self, session: LabSession, event: Event) -> None:
        match event["event"]:
            case "report":
                record = self.records.get(event["data"]["nodeid"])
                if record is not None:
                    record.events.append(event)
            case "warning" | "suite-property" | "xml-attribute":
                (self.records[self._left[0].nodeid].events if self._left else self.late).append(event)
            case "finish":
                self._end(event["id"])
                self._pass_over_missing(session)
            case "collected":
                self._pass_over_missing(session)

    def _end(self, nodeid: str, failure: Failure | None = None) -> None:
        """A test is over, and the next one's turn has come."""
        if self._left and self._left[0].nodeid == nodeid:
            self._left.popleft()
            record = self.records[nodeid]
            record.failure, record.over = failure, True

    def _pass_over_missing(self, session: LabSession) -> None:
        assert session.collected is not None
        while self._left and (nodeid := self._left[0].nodeid) not in session.collected:
            self._end(nodeid, Failure(session.why_missing(nodeid)))

    def _died(self, session: LabSession, reason: str) -> None:
        nodeid = self._left[0].nodeid
        record = self.records[nodeid]
        reached = session.collected is not None
        death = session.died(nodeid if reached else None, reason)
        if self._spares:
            self._spares -= 1
            record.deaths.append(f"{death.text}\nIt was replaced.\n{death.evidence}")
            record.events.clear()
            self._close(session, ", REPLACED")
            self._boot()
            return
        if reached:
            self._end(nodeid, replace(death, phase=record.phase))
        self._give_up(session.not_run)
        self._close(session)
        self.over = True

    def _give_up(self, why: Callable[[], str]) -> None:
        while self._left:
            self._end(self._left[0].nodeid, Failure(why()))

    def _close(self, session: LabSession, remark: str = "") -> None:
        self.lines.append(session.close() + remark)
        self._session = None

    def stop(self) -> None:
        """Order the host to end; ``close`` waits for it."""
        if self._session is not None:
            self._session.order_end()

    def close(self) -> None:
        """End the host that still runs, if any."""
        if self._session is not None:
            self._close(self._session)
        self.over = True


class Hosts:
    """Starts runs in their order, as many at once as there are jobs and as fit into memory; one always does.

    ``needs`` are the bytes that the hosts of a run take. ``jobs`` may change while they run.
    """

    def __init__(self, runs: Mapping[HostRun, int], jobs: int, memory: int) -> None:
        self._needs = dict(runs)
        self.jobs = jobs
        self._memory = memory

    def poll(self) -> bool:
        """Let every host go on, and start what there is room for; returns whether anything has happened."""
        moved = sum(run.poll() for run in self._needs) > 0
        for run, need in self._needs.items():
            busy = [other for other in self._needs if other.started and not other.over]
            used = sum(self._needs[other] for other in busy)
            if not run.started and (not busy or (len(busy) < self.jobs and used + need <= self._memory)):
                run.start()
                moved = True
        return moved

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return all(run.over for run in self._needs)

    @property
    def left(self) -> bool:
        """Whether a test has no record yet."""
        return any(run.left for run in self._needs)

    def close(self) -> None:
        """End every host that still runs."""
        for run in self._needs:
            run.stop()
        for run in self._needs:
            run.close()
