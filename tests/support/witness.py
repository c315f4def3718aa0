"""Witnesses that the project did not write: the edu device's own DMA, pagemap, tracepoints, the emulated IOMMU."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from kvmpass.layout import PAGE, Range
from kvmpass.machine import AssignedDevice

BUFFER = 0x40000
TRACING = Path("/sys/kernel/tracing")
_serial = itertools.count(1)


class Edu:
    """QEMU's edu device (docs/specs/edu.rst): up to 4095 bytes by DMA, each transfer takes 100 ms."""

    def __init__(self, device: AssignedDevice) -> None:
        self.bar = device.regions[0]
        self.bdf = str(device.bdf)
        device.enable()
        assert self.bar.read_int(0) == 0x010000ED

    def _transfer(self, source: int, target: int, size: int, direction: int) -> None:
        for register, value in ((0x80, source), (0x88, target), (0x90, size), (0x98, 1 | direction)):
            self.bar.write_int(register, value, 8)
        deadline = time.monotonic() + 20
        while self.bar.read_int(0x98, 8) & 1:
            assert time.monotonic() < deadline, "the edu device's DMA does not end"
            time.sleep(0.005)

    def load(self, gpa: int, size: int = 16) -> None:
        """From guest memory into the device."""
        self._transfer(gpa, BUFFER, size, 0)

    def store(self, gpa: int, size: int = 16) -> None:
        """From the device into guest memory."""
        self._transfer(BUFFER, gpa, size, 2)


def pattern() -> bytes:
    """16 bytes that occur nowhere else."""
    return b"kvmpass" + next(_serial).to_bytes(4, "big") + os.urandom(5)


def physical(pid: int | str, address: int) -> int:
    """The host-physical address behind a virtual one (Documentation/admin-guide/mm/pagemap.rst); needs root."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as file:
        file.seek(address // PAGE * 8)
        entry = int.from_bytes(file.read(8), "little")
    assert entry >> 63, "the page is not present"
    return (entry & (1 << 55) - 1) * PAGE + address % PAGE


def locked_bytes(field: str = "VmLck") -> int:
    """What the kernel has locked for this process; iommufd counts it as ``VmPin``."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def traces(what: str = "vfio|kvm") -> list[str]:
    """What of VFIO or KVM is left in this process: descriptors and mappings."""
    pattern = re.compile(rf"/dev/({what})|anon_inode:\[?({what})")
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if pattern.match(target):
                found.append(target)
    maps = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    found += [fields[5] for fields in maps if len(fields) == 6 and pattern.match(fields[5])]
    return found


@contextlib.contextmanager
def iommu_events() -> Iterator[list[tuple[str, Range]]]:
    """The kernel's iommu:map and iommu:unmap tracepoints for this process, filled in when the block ends."""
    events: list[tuple[str, Range]] = []
    files = {name: TRACING / f"events/iommu/{name}/enable" for name in ("map", "unmap")}
    (TRACING / "set_event_pid").write_text(str(os.getpid()))
    (TRACING / "trace").write_text("")
    try:
        for file in files.values():
            file.write_text("1")
        yield events
    finally:
        for file in files.values():
            file.write_text("0")
        text = (TRACING / "trace").read_text()
        (TRACING / "set_event_pid").write_text(" ")
    lost = re.search(r"LOST (\d+) EVENTS", text)
    assert lost is None, "the trace buffer was too small"
    # Unmapping asks for a page and gets as much as the page table's entry held: unmapped_size.
    for match in re.finditer(r" (map|unmap): IOMMU: iova=0x([0-9a-f]+) -.* (?:unmapped_)?size=(\d+)$", text, re.M):
        events.append((match[1], Range(int(match[2], 16), int(match[3]))))


def without_probe(events: list[tuple[str, Range]]) -> None:
    """Drop the kernel's own trial of two pages when a domain is made (vfio_test_domain_fgsp, type 1)."""
    if events[:1] != [("map", Range(0, 2 * PAGE))]:
        return
    assert events[1][0] == "unmap"
    del events[: 2 if events[1][1].size == 2 * PAGE else 3]


def merged(ranges: list[Range]) -> list[Range]:
    """Adjacent ranges joined; asserts that none overlap."""
    result: list[Range] = []
    for range_ in sorted(ranges):
        assert not result or result[-1].end <= range_.start, f"{range_} overlaps {result[-1]}"
        if result and result[-1].end == range_.start:
            result[-1] = Range(result[-1].start, result[-1].size + range_.size)
        else:
            result.append(range_)
    return result


def translations(trace: Path, bdf: str, offset: int) -> list[tuple[int, int]]:
    """(I/O virtual, host-physical) pairs that the emulated IOMMU printed for a device after ``offset``."""
    text = trace.read_bytes()[offset:].decode(errors="replace")
    short = bdf.partition(":")[2]
    return [
        (int(match[1], 16), int(match[2], 16))
        for match in re.finditer(rf"devid: {short} gpa 0x([0-9a-f]+) hpa 0x([0-9a-f]+)", text)
    ]


def same_page(gpa: int, physical_address: int, printed: int) -> bool:
    """Whether what the emulated IOMMU printed for ``gpa`` is the base of the page, of any size, that holds it."""
    masks = ((1 << bits) - 1 for bits in range(12, 40))
    return any(printed == physical_address & ~mask and gpa & mask == physical_address & mask for mask in masks)
