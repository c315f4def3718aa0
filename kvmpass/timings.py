"""The stages of one run: how long each took, and how often the guest exited during it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from kvmpass._dataclass import dataclass

Mark = Callable[[str], None]
"""Called with the name of a stage when it ends."""


def unmarked(name: str) -> None:
    """Do nothing: a ``Mark`` for callers that do not measure."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a run, which ends where the next one begins."""

    name: str
    """What was done."""
    seconds: float
    """How long it took."""
    cpu_seconds: float
    """CPU time of this process during it, the guest's included."""
    exits: int
    """Exits of the guest to user space during it."""


class Timings:
    """The stages since this process started.

    Synchronization: ``mark`` from one thread at a time.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        """The stages that have ended, in order."""
        self.count_exits: Callable[[], int] = lambda: 0
        """Returns the number of exits so far."""
        self._before = (_seconds_of_start(), 0.0, 0)

    def mark(self, name: str) -> None:
        """End a stage, which began at the previous call or at the start of this process, and name it."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time(), self.count_exits()
        seconds, cpu, exits = (after - before for after, before in zip(now, self._before, strict=True))
        self.stages.append(Stage(name, seconds, cpu, int(exits)))
        self._before = now

    @property
    def seconds(self) -> float:
        """The length of all stages."""
        return sum(stage.seconds for stage in self.stages)


def _seconds_of_start() -> float:
    """Return when this process has started, on ``CLOCK_BOOTTIME`` (``starttime`` of proc_pid_stat(5): ticks)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
