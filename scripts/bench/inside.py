"""The measurements of ``make bench``, inside a host with AMD-V and AMD-Vi: ``inside.py PROGRAMS SECTION:ROUNDS…``.

Programs take turns in each round, so that what else the machine does meets them alike. Each value is one sample;
units are in the names of the rows. Devices are those that ``KVMPASS_TEST_…`` names, else what is found by role.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from attach import memory, spans
from calls import commands, layers
from guests import guests
from ioctls import calls
from samples import Bench, Job, Samples, Section
from sessions import sessions
from starts import parallel, processes, start

from kvmpass import host
from kvmpass.testing.roles import discover, from_environment

SECTIONS: Mapping[str, Section] = MappingProxyType(
    {
        "layers": layers,
        "calls": calls,
        "memory": memory,
        "commands": commands,
        "sessions": sessions,
        "start": start,
        "spans": spans,
        "processes": processes,
        "guests": guests,
        "parallel": parallel,
    }
)


SECONDS = 200
"""Of a job, or of what a section prepares, at most: the longest takes 20, and a program that hangs is given 120."""


class TimeLimit(Exception):
    """Ends a job. It is no ``TimeoutError``: that is an ``OSError``, which what a job waits for may ignore."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeLimit`` in the block, whatever it waits for, after some seconds."""

    def expire(*_: object) -> None:
        raise TimeLimit(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(bench: Bench, job: Job) -> str:
    """Run a job, which leaves no sample if it fails. Return why it has failed, or nothing."""
    try:
        with bench.samples.complete(), time_limit(SECONDS):
            job()
    except Exception as error:
        traceback.print_exc()
        return explanation(error)
    return ""


def explanation(error: Exception) -> str:
    """Return what is recorded of an error."""
    return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])


def measure(bench: Bench, name: str, rounds: int, result: Path) -> None:
    """Run the jobs of a section in rounds, every second one backwards; write the samples after each round.

    A job that fails is repeated: an emulated host has faults too. When as many were repeated as may be, it is left
    out from then on, and the others are measured nevertheless.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        with time_limit(SECONDS):
            jobs = list(stack.enter_context(SECTIONS[name](bench)))
        for number in range(rounds):
            for job in jobs[:: 1 if number % 2 == 0 else -1]:
                while reason := attempt(bench, job):
                    if not bench.samples.repeat(name, reason):
                        bench.samples.fail(name, reason)
                        jobs.remove(job)
                        break
            bench.samples.seconds[name] = time.monotonic() - started
            bench.samples.done[name] = number + 1
            bench.samples.save(result)


def main(programs: str, *sections: str) -> None:
    """Measure, and write everything to a file in ``programs``."""
    named = from_environment(os.environ)
    devices = named or discover()
    bench = Bench(Samples(), Path(programs), devices, emulated=not named)
    if "nvme" not in devices:
        sys.exit("bench: no NVMe drive to assign: set KVMPASS_TEST_NVME=BDF")
    bound, result = bench.further(), Path(programs, f"result-{sections[0].partition(':')[0]}")
    bench.settle()
    host.bind(bound)  # until the host ends, or kvmpass unbind
    try:
        for section in sections:
            name, _, rounds = section.partition(":")
            try:
                measure(bench, name, int(rounds), result)
            except Exception as error:  # what the section prepares
                traceback.print_exc()
                bench.samples.fail(name, explanation(error))
            bench.samples.save(result)
    finally:
        host.unbind(bound)


if __name__ == "__main__":
    main(*sys.argv[1:])
