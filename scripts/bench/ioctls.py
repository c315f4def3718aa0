"""The ioctls of an assignment: those of ``Machine.assign``, beside those of the program in C.

strace notes the calls of KVM, VFIO and iommufd. ``REASONS`` says what each is for that C does not make;
``tests/amdvi/test_calls.py`` holds both against what is made.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from samples import Bench, Job

from kvmpass.layout import GIB, MIB
from kvmpass.machine import Machine

STRACE = ("strace", "-f", "-qq", "-e", "trace=ioctl", "-X", "raw")
MARKS = ("-1", "1048576")
"""Descriptors that are not open: an ioctl of one ends a step."""
STEPS = ("first device", "second device", "adding 64 MiB", "removing 64 MiB")
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "KVM_IRQFD": "connects the line of INTx to the guest's interrupt controllers",
        "KVM_SET_DEVICE_ATTR": "makes the group or device known to KVM, as VFIO asks of a user with KVM",
        "VFIO_CHECK_EXTENSION": "refuses a kernel without type 1",
        "VFIO_GET_API_VERSION": "refuses an ABI that is not known",
        "VFIO_DEVICE_GET_INFO": "how many regions and interrupts the device has, and whether it can be reset",
        "VFIO_DEVICE_GET_IRQ_INFO": "the interrupts that the guest is shown",
        "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO": "what a reset of the bus resets, where the device has none of its own",
        "VFIO_DEVICE_GET_REGION_INFO": "the BARs that the guest is shown, and how they can be mapped",
        "VFIO_DEVICE_SET_IRQS": "INTx, and notices of errors and of requests to return the device",
        "VFIO_IOMMU_GET_INFO": "refuses memory in a range that this device's IOMMU cannot map",
        "IOMMU_IOAS_IOVA_RANGES": "refuses memory in a range that this device's IOMMU cannot map",
    }
)
LEAST: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "type1": {
            "VFIO_GROUP_GET_STATUS": 1,
            "VFIO_GROUP_SET_CONTAINER": 1,
            "VFIO_SET_IOMMU": 1,
            "VFIO_IOMMU_MAP_DMA": 1,
            "VFIO_GROUP_GET_DEVICE_FD": 1,
        },
        "iommufd": {
            "IOMMU_IOAS_ALLOC": 1,
            "VFIO_DEVICE_BIND_IOMMUFD": 1,
            "VFIO_DEVICE_ATTACH_IOMMUFD_PT": 1,
            "IOMMU_IOAS_MAP": 1,
        },
    }
)
"""The calls that the program in C makes for the first device."""
_NAMES: Mapping[int, str] = MappingProxyType(
    {
        0xAE01: "KVM_CREATE_VM",
        0xAE03: "KVM_CHECK_EXTENSION",
        0x4020AE46: "KVM_SET_USER_MEMORY_REGION",
        0x4020AE76: "KVM_IRQFD",
        0x4008AE6A: "KVM_SET_GSI_ROUTING",
        0x4018AEE1: "KVM_SET_DEVICE_ATTR",
        0x3B64: "VFIO_GET_API_VERSION",
        0x3B65: "VFIO_CHECK_EXTENSION",
        0x3B66: "VFIO_SET_IOMMU",
        0x3B67: "VFIO_GROUP_GET_STATUS",
        0x3B68: "VFIO_GROUP_SET_CONTAINER",
        0x3B69: "VFIO_GROUP_UNSET_CONTAINER",
        0x3B6A: "VFIO_GROUP_GET_DEVICE_FD",
        0x3B6B: "VFIO_DEVICE_GET_INFO",
        0x3B6C: "VFIO_DEVICE_GET_REGION_INFO",
        0x3B6D: "VFIO_DEVICE_GET_IRQ_INFO",
        0x3B6E: "VFIO_DEVICE_SET_IRQS",
        0x3B6F: "VFIO_DEVICE_RESET",
        0x3B70: "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
        0x3B71: "VFIO_DEVICE_PCI_HOT_RESET",
        0x3B75: "VFIO_DEVICE_FEATURE",
        0x3B76: "VFIO_DEVICE_BIND_IOMMUFD",
        0x3B77: "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        0x3B78: "VFIO_DEVICE_DETACH_IOMMUFD_PT",
        0x3B80: "IOMMU_DESTROY",
        0x3B81: "IOMMU_IOAS_ALLOC",
        0x3B84: "IOMMU_IOAS_IOVA_RANGES",
        0x3B85: "IOMMU_IOAS_MAP",
        0x3B86: "IOMMU_IOAS_UNMAP",
    }
)
# VFIO has given these numbers twice: to calls of a device, and of the container.
_OF_THE_CONTAINER = {0x3B70: "VFIO_IOMMU_GET_INFO", 0x3B71: "VFIO_IOMMU_MAP_DMA", 0x3B72: "VFIO_IOMMU_UNMAP_DMA"}
MAPS = ("VFIO_IOMMU_MAP_DMA", "IOMMU_IOAS_MAP")
"""The calls that map memory for DMA."""
_CALL = re.compile(r"ioctl\((-?\w+), (0x[0-9a-f]+|0)\b")
_TYPES = (0x3B, 0xAE)  # VFIO's and iommufd's; KVM's


def node(bdf: str, backend: str) -> str:
    """Return the node of a device below ``/dev/vfio``: its group's, or its own."""
    place = Path("/sys/bus/pci/devices", bdf)
    if backend == "type1":
        return (place / "iommu_group").resolve().name
    return "devices/" + next((place / "vfio-dev").iterdir()).name


def parsed(lines: Sequence[str]) -> list[Counter[str]]:
    """Return the calls of each step from what strace has written."""
    steps: list[Counter[str]] = [Counter()]
    containers = set()
    for fd, text in (found.groups() for line in lines if (found := _CALL.search(line))):
        number = int(text, 16)
        if fd in MARKS:
            steps.append(Counter())
        elif number >> 8 & 0xFF in _TYPES:
            if number == 0x3B66:
                containers.add(fd)
            name = (fd in containers and _OF_THE_CONTAINER.get(number)) or _NAMES.get(number, hex(number))
            steps[-1][name] += 1
    return steps


def traced(work: Callable[[], None]) -> list[Counter[str]]:
    """Run ``work`` in a child of this process; return the calls of each of its steps."""
    readable, writable = os.pipe()
    with tempfile.TemporaryDirectory() as folder, os.fdopen(readable, "rb", buffering=0) as go:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(writable)
                go.read(1)
                work()
                status = 0
            finally:
                os._exit(status)
        output = Path(folder, "calls")
        tracer = subprocess.Popen([*STRACE, "-o", str(output), "-p", str(pid)])
        try:
            while f"TracerPid:\t{tracer.pid}" not in Path(f"/proc/{pid}/status").read_text():
                if tracer.poll() is not None:
                    raise OSError(f"strace has ended with status {tracer.returncode}")
        finally:
            os.close(writable)  # the child goes on
            _, status = os.waitpid(pid, 0)
        tracer.wait()
        if status:
            raise OSError(f"the traced process has ended with status {os.waitstatus_to_exitcode(status)}")
        return parsed(output.read_text().splitlines())


def mark() -> None:
    """End a step."""
    with suppress(OSError):
        fcntl.ioctl(int(MARKS[1]), 0)


def of_kvmpass(backend: str, bdfs: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the calls of ``Machine.assign`` for two devices, and of more memory, by step."""

    def work() -> None:
        with Machine(memory="64M", backend=backend) as machine:
            mark()
            for bdf in bdfs:
                machine.assign(bdf)
                mark()
            region = machine.memory.add_ram(5 * GIB, 64 * MIB)
            mark()
            machine.memory.remove(region)
            mark()

    return dict(zip(STEPS, map(dict, traced(work)[1:-1]), strict=True))


def of_c(baseline: str, backend: str, bdfs: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the same of the program in C."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "calls")
        words = [baseline, backend, "64", *(f"{bdf}:{node(bdf, backend)}" for bdf in bdfs)]
        subprocess.run([*STRACE, "-o", str(output), *words], check=True, stdout=subprocess.DEVNULL)
        steps = parsed(output.read_text().splitlines())
    return dict(zip(STEPS, map(dict, steps[:-1]), strict=True))


def extra(own: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
    """Return the calls that one makes and the other does not, with how many more."""
    return dict(Counter(own) - Counter(theirs))


@contextmanager
def calls(bench: Bench) -> Iterator[list[Job]]:
    """Count the ioctls of both, once."""
    found: dict[str, Any] = {}
    devices = bench.further()[:2]
    for backend in ("type1", "iommufd"):
        row = f"ioctls of an assignment, {backend}"
        if shutil.which("strace") is None:
            bench.samples.lack(row, "needs strace")
        elif len(devices) < 2:
            bench.samples.lack(row, "needs two devices")
        elif backend == "iommufd" and not Path("/dev/vfio/devices").exists():
            bench.samples.lack(row, "this host's kernel has no VFIO character devices")
        else:
            found[backend] = {
                "kvmpass": of_kvmpass(backend, devices),
                "C": of_c(bench.baseline, backend, devices),
            }
    bench.samples.count("ioctls", found)
    yield []
