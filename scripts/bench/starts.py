"""How long a program takes from its start: until the device is attached, and until the first ``KVM_RUN``.

``attached`` is what each program does with little more than the memory and the device: kvmpass makes an initramfs
and loads the guest, QEMU has no kernel. For the first ``KVM_RUN`` both are given the same kernel and initramfs, which
is not the same work: kvmpass has read them and copied them to the guest's memory by then. QEMU has read the kernel
and mapped the initramfs for fw_cfg (``hw/i386/x86.c``); its firmware and option ROM, SeaBIOS and linuxboot, copy both
to the guest's memory after the first ``KVM_RUN``. The device is bound to vfio-pci before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from attach import SIZES, in_c, until
from qemu import SECONDS, WORDS, Qemu
from report import BOUND, IMPORT, PASS, STAGES
from samples import CLICK, KVMPASS, Bench, Job, elapsed, spent

from kvmpass.guest import GuestSpec, prepare
from kvmpass.layout import MIB

CPUS = 2
"""Of the emulated host in which parallel work is measured."""
LAST = "assignment"
"""The stage of ``--timings`` at whose end the device is attached."""
SMALL, LARGE = SIZES[0], SIZES[-1]
LEAST = (64, 128)
"""MiB with which the CPU time is Python's: the first that the guest's kernel starts with (Debian's takes 80)."""
ONLY_CLICK = [sys.executable, "-c", "import click, os; os._exit(0)"]
"""Does not finalize the interpreter: kvmpass is killed at its first ``KVM_RUN``, and does not do so either."""


def attached_by_kvmpass(bench: Bench, row: str, size: int, stages: str) -> None:
    """Run ``kvmpass assign``, whose guest ends as soon as it is started; record the time until the attach.

    ``stages``: the name under which its stages are recorded.
    """
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder, "status")
        words = ["assign", "--memory", f"{size}M", "--backend", "type1", "--timings", "--status-file", str(status)]
        words += ["--timeout", "0.01", bench.devices["nvme"], "--", "true"]
        subprocess.run([*KVMPASS, *words], check=False, capture_output=True)
        timings: dict[str, Any] = json.loads(status.read_text())["timings"]
    bench.samples.note(row, "kvmpass", until(timings, LAST))
    found = timings["stages"]
    last = [stage["name"] for stage in found].index(LAST)
    bench.samples.counts.setdefault(STAGES + stages, []).append(found[: last + 1])


def attached_by_qemu(bench: Bench, row: str, size: int, program: str = "QEMU", *more: str) -> None:
    """Start QEMU with the device, its CPUs stopped; record the time until it answers."""
    with Qemu("-m", f"{size}M", "-S", "-device", f"vfio-pci,host={bench.devices['nvme']}", *more) as peer:
        peer.command("quit")
        bench.samples.note(row, program, peer.attach_seconds)


def attached_by_c(bench: Bench, row: str, size: int) -> None:
    """Run the program in C; record the time until it has attached the device."""
    bench.samples.note(row, "C", in_c(bench, "type1", size, [bench.devices["nvme"]])[0])


def preallocated(size: int) -> list[str]:
    """Return the words for memory that QEMU populates with a thread on each CPU."""
    memory = f"memory-backend-ram,id=ram,size={size}M,prealloc=on,prealloc-threads={CPUS}"
    return ["-object", memory, "-machine", "memory-backend=ram"]


class Loaded:
    """A kernel and an initramfs, and the words that give them to each program."""

    def __init__(self, bench: Bench) -> None:
        image = prepare(GuestSpec(command=("true",)), [])
        self._bench = bench
        self._kernel, self._cmdline = str(image.kernel.path), image.cmdline
        self._initrd = bench.programs / "initrd"
        self._initrd.write_bytes(image.initrd)
        self.least = next((size for size in LEAST if size * MIB >= image.least_memory), SMALL)
        """MiB with which the guest starts, as few as possible."""

    def kvmpass(self, size: int) -> list[str]:
        """Return the words of an assignment."""
        words = ["assign", "--memory", f"{size}M", "--backend", "type1", "--kernel", self._kernel]
        return [*KVMPASS, *words, "--initrd", str(self._initrd), self._bench.devices["nvme"]]

    def qemu(self, size: int) -> list[str]:
        """Return the words of QEMU."""
        words = ["-m", f"{size}M", "-kernel", self._kernel, "-initrd", str(self._initrd), "-append", self._cmdline]
        return [*WORDS, *words, "-device", f"vfio-pci,host={self._bench.devices['nvme']}"]

    def measure(self, row: str, program: str, size: int, cpu_row: str | None = None) -> None:
        """Record the time of a program until its first ``KVM_RUN``, and its CPU time in user mode in another row."""
        words = self.kvmpass(size) if program == "kvmpass" else self.qemu(size)
        tracer = [str(self._bench.programs / "until_run"), str(SECONDS)]
        quiet = subprocess.DEVNULL
        done = subprocess.run([*tracer, *words], stdin=quiet, capture_output=True, text=True, timeout=2 * SECONDS)
        if done.returncode:
            raise RuntimeError(f"{row}: {program}: {done.stderr.strip()}")
        nanoseconds, in_user_mode = map(int, done.stdout.splitlines()[-1].split())
        self._bench.samples.note(row, program, nanoseconds / 1e9)
        if cpu_row is not None:
            self._bench.samples.note(cpu_row, program, in_user_mode / 1e6)


def first_run(loaded: Loaded, sizes: Sequence[int], suffix: str = "") -> list[Job]:
    """Return jobs that measure until the first ``KVM_RUN``."""
    return [
        partial(loaded.measure, f"process start to first KVM_RUN, {size} MiB{suffix}, s", program, size)
        for size in sizes
        for program in ("kvmpass", "QEMU")
    ]


@contextmanager
def start(bench: Bench) -> Iterator[list[Job]]:
    """Measure until the first ``KVM_RUN`` what does not depend on the guest's size."""
    loaded, note = Loaded(bench), bench.samples.note
    size = loaded.least
    row, cpu = f"process start to first KVM_RUN, {size} MiB, s", "user CPU until the first KVM_RUN, ms"
    yield [
        partial(loaded.measure, row, "kvmpass", size, cpu),
        lambda: note(cpu, "import click", spent(ONLY_CLICK, user=True)),
        partial(loaded.measure, row, "QEMU", size, cpu),
    ]


def whole(bench: Bench, program: str, words: Sequence[str]) -> None:
    """Record how long a program of Python takes."""
    bench.samples.note(BOUND, program, elapsed(partial(subprocess.run, words, check=True)))


@contextmanager
def processes(bench: Bench) -> Iterator[list[Job]]:
    """Measure until the device is attached, and until the first ``KVM_RUN``."""
    jobs: list[Job] = [
        partial(whole, bench, PASS, [sys.executable, "-c", "pass"]),
        partial(whole, bench, IMPORT, CLICK),
    ]
    for size in SIZES:
        row = f"process start to attached, {size} MiB, s"
        jobs += [
            partial(attached_by_kvmpass, bench, row, size, f"{size} MiB"),
            partial(attached_by_qemu, bench, row, size),
            partial(attached_by_c, bench, row, size),
        ]
    yield jobs + first_run(Loaded(bench), (SMALL, LARGE))


@contextmanager
def parallel(bench: Bench) -> Iterator[list[Job]]:
    """The same on a host with several CPUs, of which QEMU uses one unless it is told to."""
    if len(os.sched_getaffinity(0)) != CPUS:
        bench.samples.lack(f"rows with {CPUS} CPUs", "the other rows are measured with all CPUs of this host")
        yield []
        return
    jobs: list[Job] = []
    for size in (SMALL, LARGE):
        words = f"{size} MiB, {CPUS} CPUs"
        row = f"process start to attached, {words}, s"
        jobs += [
            partial(attached_by_kvmpass, bench, row, size, words),
            partial(attached_by_qemu, bench, row, size),
        ]
        if size == LARGE:
            jobs += [partial(attached_by_qemu, bench, row, size, "QEMU, prealloc", *preallocated(size))]
    yield jobs + first_run(Loaded(bench), (SMALL, LARGE), f", {CPUS} CPUs")
