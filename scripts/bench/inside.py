"""The measurements of ``make bench``, inside a host with AMD-V and AMD-Vi: ``inside.py PROGRAMS SECTION:ROUNDS…``.

Programs take turns in each round, so that what else the machine does meets them alike. Each value is one sample;
units are in the names of the rows. Devices are those that ``KVMPASS_TEST_…`` names, else what is found by role.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from attach import memory, spans
from calls import commands, layers
from guests import guests
from ioctls import calls
from samples import Bench, Samples, Section
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


def measure(bench: Bench, name: str, rounds: int, result: Path) -> None:
    """Run the jobs of a section in rounds, every second one backwards; write the samples after each round.

    A job that fails leaves no sample, and the others are measured nevertheless: an emulated host has faults too.
    """
    started = time.monotonic()
    with SECTIONS[name](bench) as jobs:
        for number in range(rounds):
            for job in jobs if number % 2 == 0 else reversed(jobs):
                try:
                    job()
                except Exception as error:
                    traceback.print_exc()
                    bench.samples.fail(name, f"{type(error).__name__}: {error}")
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
                bench.samples.fail(name, f"{type(error).__name__}: {error}")
            bench.samples.save(result)
    finally:
        host.unbind(bound)


if __name__ == "__main__":
    main(*sys.argv[1:])
