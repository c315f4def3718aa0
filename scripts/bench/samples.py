"""What ``make bench`` collects: samples by row and program, counts that explain them, and rows that have none."""

from __future__ import annotations

import copy
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from kvmpass.layout import MIB

KVMPASS = [sys.executable, "-m", "kvmpass"]
CLICK = [sys.executable, "-c", "import click"]
"""The peer of what is Python's alone."""
Job = Callable[[], object]
MADV_POPULATE_WRITE = 23
"""Not in Python's ``mmap``."""
REPEATS = 3
"""How many jobs of a section that fail are repeated, at most."""
LEFT = 256 * MIB
"""Bytes for the emulated host itself, which would end processes without them."""


class Samples:
    """The samples so far; the unit of a row is in its name."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.counts: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.failures: dict[str, list[str]] = {}
        """Why jobs have failed for good, by section."""
        self.repeated: dict[str, list[str]] = {}
        """Why jobs have failed and were repeated, by section."""
        self.seconds: dict[str, float] = {}
        self.done: dict[str, int] = {}
        """Rounds that are complete, by section."""
        self.replaced: dict[str, int] = {}
        """How many emulated hosts have ended early and were replaced, by their first section."""

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

    def repeat(self, section: str, reason: str) -> bool:
        """Record that a job of a section is repeated. Return False if as many were repeated as may be."""
        reasons = self.repeated.setdefault(section, [])
        if len(reasons) == REPEATS:
            return False
        reasons.append(reason)
        return True

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Forget what the block has recorded if it fails."""
        before = copy.deepcopy(vars(self))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def save(self, path: Path) -> None:
        """Write everything to a file, which is whole even if the host ends meanwhile."""
        begun = path.with_name(f"{path.name}.new")
        begun.write_text(json.dumps(vars(self)))
        begun.replace(path)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two hosts have measured of the same sections, one after the other; of each count the latest."""
    both = {name: {**first[name], **second[name]} for name in first}
    for row, programs in second["samples"].items():
        before = first["samples"].get(row, {})
        both["samples"][row] = {
            **before,
            **{name: before.get(name, []) + values for name, values in programs.items()},
        }
    for name in ("seconds", "done"):
        both[name] |= {section: first[name].get(section, 0) + value for section, value in second[name].items()}
    for name in ("counts", "failures", "repeated"):  # runs, reasons
        lists = {what: value for what, value in second[name].items() if isinstance(value, list)}
        both[name] |= {what: first[name].get(what, []) + value for what, value in lists.items()}
    return both


class Bench(NamedTuple):
    """What a section works with."""

    samples: Samples
    """Where it records what it measures."""
    programs: Path
    """Directory of the compiled programs; it can be written to."""
    devices: Mapping[str, str]
    """PCI address by role (``kvmpass.testing.roles``)."""
    emulated: bool = False
    """Whether this host is emulated."""

    @property
    def baseline(self) -> str:
        """The program in C."""
        return str(self.programs / "baseline")

    def settle(self) -> None:
        """Use nearly all free memory of an emulated host once.

        Memory that was never used is allocated outside first, and takes three times as long to populate.
        """
        free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
        if self.emulated and free > LEFT:
            populate(free - LEFT)

    def further(self) -> list[str]:
        """Return the devices that are assigned, the drive first, one of the two network cards left out."""
        names = ("nvme", "nvme2", "edu", "edu2", "nic", "ahci", "xhci", "virtio_blk")
        return [self.devices[name] for name in names if name in self.devices]


def populate(size: int) -> None:
    """Allocate bytes, and free them again."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:  # shared memory has small pages
        area.madvise(mmap.MADV_HUGEPAGE)
        area.madvise(MADV_POPULATE_WRITE)


Section = Callable[[Bench], AbstractContextManager[Sequence[Job]]]
"""Prepares what a part of the rows needs; its jobs are repeated in each round."""


@contextmanager
def running(words: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run a program until it ends, or kill it and its children if the block fails."""
    with subprocess.Popen(words, start_new_session=True, **options) as child:
        try:
            yield child
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise


def spent(words: Sequence[str], status: int = 0, *, user: bool = False) -> float:
    """Run a program, which must exit with ``status``; return its CPU time, or that in user mode, in milliseconds."""
    quiet = subprocess.DEVNULL
    with running(words, stdin=quiet, stdout=quiet, stderr=quiet) as child:
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
