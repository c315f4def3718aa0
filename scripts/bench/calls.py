"""One ioctl through each layer, and the CPU time of commands."""

from __future__ import annotations

import ctypes
import fcntl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from samples import CLICK, KVMPASS, Bench, Job, spent

from kvmpass._native import lib

KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY = 0xAE03, 3
CALLS = 20000


def each(call: Callable[[], object]) -> float:
    """Return nanoseconds of one call."""
    started = time.monotonic_ns()
    for _ in range(CALLS):
        call()
    return (time.monotonic_ns() - started) / CALLS


@contextmanager
def layers(bench: Bench) -> Iterator[list[Job]]:
    """Measure one ioctl through each layer."""
    row, note = "one ioctl (KVM_CHECK_EXTENSION), ns", bench.samples.note
    libc = ctypes.CDLL(None)

    def in_c() -> float:
        words = [bench.baseline, "ioctl", str(CALLS)]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    with Path("/dev/kvm").open("rb+", buffering=0) as kvm:
        fd = kvm.fileno()
        yield [
            lambda: note(row, "kvmpass", each(lambda: lib.kvm_check_extension(fd, KVM_CAP_USER_MEMORY))),
            lambda: note(row, "fcntl.ioctl", each(lambda: fcntl.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY))),
            lambda: note(row, "ctypes", each(lambda: libc.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY))),
            lambda: note(row, "C", in_c()),
        ]


@contextmanager
def commands(bench: Bench) -> Iterator[list[Job]]:
    """Measure the CPU time of ``--help`` and ``list``."""
    note = bench.samples.note
    yield [
        lambda: note("CPU of --help, ms", "kvmpass", spent([*KVMPASS, "--help"])),
        lambda: note("CPU of --help, ms", "import click", spent(CLICK)),
        lambda: note("CPU of list, ms", "kvmpass", spent([*KVMPASS, "list"])),
        lambda: note("CPU of list, ms", "import click", spent(CLICK)),
    ]
