"""CPUs and memory of this machine: how many emulated hosts it runs in parallel, and how much slower each is then."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from kvmpass.errors import LayoutError
from kvmpass.layout import parse_size

OVERHEAD = 512 << 20  # bytes that an emulator uses in addition to its host's memory


def size(text: str) -> int:
    """Return the bytes of a memory size as QEMU takes it, where a bare number is in MiB; 0 if it is invalid."""
    with suppress(LayoutError):
        return parse_size(f"{text}M" if text.isdecimal() else text)
    return 0


def cpus(root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process may use, by its affinity and its control group's quota."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, round(int(quota) / int(period)))
    return max(1, count)


def memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory available to emulated hosts, within the control group's limit."""
    found = re.search(r"^MemAvailable: *(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    free = int(found[1]) << 10 if found else 0
    with suppress(OSError, ValueError):
        group = root / "sys/fs/cgroup"
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


def slowdown(jobs: int, of_cpus: int) -> float:
    """Return the factor for time limits when ``jobs`` hosts run in parallel on so many CPUs; at least 1.

    Each host keeps one CPU busy, and its emulator's other threads and this process need some time as well. Two CPUs
    may be hyperthreads of one core.
    """
    return max(1.0, 2.0 * jobs / of_cpus) if jobs > 1 else 1.0
