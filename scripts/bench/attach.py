"""How long an attach takes, from open container to open device, and memory that is added to a guest."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ioctls import node
from qemu import Qemu
from samples import Bench, Job, elapsed, running

import kvmpass
from kvmpass.layout import GIB, MIB
from kvmpass.machine import Machine

SIZES = (256, 1024, 2048)
MORE, MORE_AT = 64 * MIB, 5 * GIB
FURTHER = {1: "second", 4: "fifth"}


def until(timings: dict[str, Any], stage: str) -> float:
    """Return the seconds from the start of the process to the end of a stage."""
    total = 0.0
    for found in timings["stages"]:
        total += float(found["seconds"])
        if found["name"] == stage:
            return total
    raise LookupError(stage)


def in_c(bench: Bench, backend: str, size: int, bdfs: Sequence[str]) -> tuple[float, dict[str, list[float]]]:
    """Run the program in C; return the seconds from its start, and those of each step."""
    words = [bench.baseline, backend, str(size), *(f"{bdf}:{node(bdf, backend)}" for bdf in bdfs)]
    started = time.monotonic()
    with running(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        seconds = time.monotonic() - started
        lines += child.stdout
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, words)
    steps: dict[str, list[float]] = {}
    for line in lines:
        step, nanoseconds = line.split()
        steps.setdefault(step, []).append(float(nanoseconds) / 1e9)
    return seconds, steps


# --- from open container to open device


def backends(bench: Bench) -> list[str]:
    """Return the back ends that this host has."""
    if Path("/dev/iommu").exists() and Path("/dev/vfio/devices").exists():
        return ["type1", "iommufd"]
    bench.samples.lack("Machine.assign, iommufd", "this host's kernel has no /dev/iommu or no VFIO character devices")
    return ["type1"]


def note_steps(bench: Bench, program: str, backend: str, size: int, steps: Sequence[float]) -> None:
    """Record the time of each device's attach."""
    bench.samples.note(f"Machine.assign, {size} MiB, {backend}, s", program, steps[0])
    for number, name in FURTHER.items():
        if number < len(steps):
            bench.samples.note(f"{name} device, {backend}, ms", program, steps[number] * 1000)


def span_of_kvmpass(bench: Bench, backend: str, size: int, bdfs: Sequence[str]) -> None:
    """Assign devices in this process, which has imported everything."""
    with Machine(memory=f"{size}M", backend=backend) as machine:
        steps = [elapsed(lambda bdf=bdf: machine.assign(bdf)) for bdf in bdfs]  # type: ignore[misc]
        note_steps(bench, "kvmpass", backend, size, steps)


def span_in_c(bench: Bench, backend: str, size: int, bdfs: Sequence[str]) -> None:
    """The same in C."""
    note_steps(bench, "C", backend, size, in_c(bench, backend, size, bdfs)[1]["device"])


@contextmanager
def spans(bench: Bench) -> Iterator[list[Job]]:
    """Measure ``Machine.assign`` beside C over the same span, and further devices."""
    devices = bench.further()
    for number, name in FURTHER.items():
        if number >= len(devices):
            bench.samples.lack(f"{name} device", f"needs {number + 1} devices, {len(devices)} are named")
    jobs: list[Job] = []
    for backend in backends(bench):
        with Machine(memory=f"{SIZES[0]}M", backend=backend) as machine:
            machine.assign(devices[0])  # imports what an assignment needs
        for size in SIZES:
            bdfs = devices if size == SIZES[0] else devices[:1]
            jobs += [
                lambda a=backend, b=size, c=bdfs: span_of_kvmpass(bench, a, b, c),  # type: ignore[misc]
                lambda a=backend, b=size, c=bdfs: span_in_c(bench, a, b, c),  # type: ignore[misc]
            ]
    yield [*jobs, lambda: further_of_qemu(bench, devices)]


def further_of_qemu(bench: Bench, devices: Sequence[str]) -> None:
    """Add a second device, and 64 MiB, to QEMU with a device whose CPUs are stopped."""
    ports = [f"pcie-root-port,id=port{number},chassis={number + 1}" for number in (0, 1)]
    words = [word for port in ports for word in ("-device", port)]
    words += ["-device", f"vfio-pci,host={devices[0]},bus=port0", "-m", "256M,slots=1,maxmem=1G", "-S"]
    with Qemu(*words) as peer:
        if len(devices) > 1:
            arguments = {"driver": "vfio-pci", "host": devices[1], "bus": "port1"}
            seconds = elapsed(lambda: peer.command("device_add", **arguments))
            bench.samples.note("second device, type1, ms", "QEMU", seconds * 1000)
        memory = {"qom-type": "memory-backend-ram", "id": "more", "size": MORE, "prealloc": True}
        seconds = elapsed(lambda: (peer.command("object-add", **memory), dimm(peer)))
        bench.samples.note("adding 64 MiB to a guest, type1, ms", "QEMU", seconds * 1000)
        peer.command("quit")


def dimm(peer: Qemu) -> None:
    """Plug the memory in."""
    peer.command("device_add", driver="pc-dimm", id="dimm", memdev="more")


# --- memory of a running guest


@contextmanager
def memory(bench: Bench) -> Iterator[list[Job]]:
    """Measure adding 64 MiB to a running guest with a device, and removing them."""
    bdf, note = bench.devices["nvme"], bench.samples.note

    def change() -> None:
        found: list[Any] = []
        regions = guest.machine.memory
        seconds = elapsed(lambda: found.append(regions.add_ram(MORE_AT, MORE)))
        note("adding 64 MiB to a guest, type1, ms", "kvmpass", seconds * 1000)
        seconds = elapsed(lambda: regions.remove(found[0]))
        note("removing 64 MiB, type1, ms", "kvmpass", seconds * 1000)

    with kvmpass.start([bdf], memory="256M", backend="type1") as guest:
        yield [change, lambda: memory_in_c(bench)]


def memory_in_c(bench: Bench) -> None:
    """The same in C, with a VM and another device."""
    _, steps = in_c(bench, "type1", 16, bench.further()[1:2])
    bench.samples.note("adding 64 MiB to a guest, type1, ms", "C", steps["add"][0] * 1000)
    bench.samples.note("removing 64 MiB, type1, ms", "C", steps["remove"][0] * 1000)
