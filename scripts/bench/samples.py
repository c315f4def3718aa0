"""What ``make bench`` collects: samples by row and program, counts that explain them, and rows that have none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

KVMPASS = [sys.executable, "-m", "kvmpass"]
CLICK = [sys.executable, "-c", "import click"]
"""The peer of what is Python's alone."""
Job = Callable[[], object]


class Samples:
    """The samples so far; the unit of a row is in its name."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.counts: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.failures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    def note(self, row: str, program: str, value: float) -> None:
        """Record a sample."""
        self.samples[row][program].append(value)
        print(f"{row}: {program}: {value:.4g}", flush=True)

    def count(self, what: str, value: Any) -> None:
        """Record a count; the latest replaces the ones before."""
        self.counts[what] = value

    def lack(self, row: str, reason: str) -> None:
        """Record why a row, or a peer of it, has no samples."""
        if row not in self.missing:
            self.missing[row] = reason
            print(f"{row}: not measured: {reason}", flush=True)

    def fail(self, section: str, reason: str) -> None:
        """Record that a job of a section has failed."""
        self.failures.setdefault(section, []).append(reason)

    def save(self, path: Path) -> None:
        """Write everything to a file."""
        path.write_text(json.dumps(vars(self)))


class Bench(NamedTuple):
    """What a section works with."""

    samples: Samples
    """Where it records what it measures."""
    programs: Path
    """Directory of the compiled programs; it can be written to."""
    devices: Mapping[str, str]
    """PCI address by role (``kvmpass.testing.roles``)."""

    @property
    def baseline(self) -> str:
        """The program in C."""
        return str(self.programs / "baseline")

    def further(self) -> list[str]:
        """Return the devices that are assigned, the drive first, one of the two network cards left out."""
        names = ("nvme", "nvme2", "edu", "edu2", "nic", "ahci", "xhci", "virtio_blk")
        return [self.devices[name] for name in names if name in self.devices]


Section = Callable[[Bench], AbstractContextManager[Sequence[Job]]]
"""Prepares what a part of the rows needs; its jobs are repeated in each round."""


def spent(words: Sequence[str], status: int = 0, *, user: bool = False) -> float:
    """Run a program, which must exit with ``status``; return its CPU time, or that in user mode, in milliseconds."""
    quiet = subprocess.DEVNULL
    child = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
    _, ended, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(ended)
    if child.returncode != status:
        raise subprocess.CalledProcessError(child.returncode, words)
    return (used.ru_utime + (0 if user else used.ru_stime)) * 1000


def resident_mib(pid: int) -> float:
    """Return the largest resident size of a program so far, in MiB.

    What wait4(2) says includes that of the parent, whose memory a child has until it runs its program.
    """
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def elapsed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.monotonic()
    call()
    return time.monotonic() - started
