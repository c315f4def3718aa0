"""An assigned device's DMA reaches the guest's own pages and nothing else; the witness is the device itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.inside import LAB_ONLY
from support.modes import MODES, NAMES, Mode, machines_use, through_compat_too
from support.recording import Calls, recording
from support.witness import (
    Edu,
    iommu_events,
    merged,
    pattern,
    physical,
    same_page,
    translations,
    without_probe,
)

from kvmpass import host
from kvmpass.dma.domain import Domain
from kvmpass.errors import AuditFailed, ReservedRange
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.machine import Machine
from kvmpass.memory import GuestMemory, MemoryRegion, RegionKind

ROM_AT = 0xF000_0000
SCRATCH = 0x10_0000


class Bench:
    """A machine with RAM on both sides of the hole below 4 GiB, a ROM, and the edu device."""

    def __init__(self, machine: Machine, edu: Edu, mode: Mode = MODES["type1"]) -> None:
        self.machine = machine
        self.edu = edu
        self.mode = mode

    @property
    def memory(self) -> GuestMemory:
        return self.machine.memory

    def device_reads(self, gpa: int) -> bytes:
        """What the device gets from ``gpa``: by way of its buffer, and from there to a page known to work."""
        self.edu.load(gpa)
        self.edu.store(SCRATCH)
        return self.memory.read(SCRATCH, 16)

    def device_writes(self, gpa: int, data: bytes) -> None:
        self.memory.write(SCRATCH, data)
        self.edu.load(SCRATCH)
        self.edu.store(gpa)


def check_reaches(bench: Bench, region: MemoryRegion, gpa: int) -> None:
    """Both directions at ``gpa`` of ``region``; read-only regions keep their bytes."""
    data = pattern()
    bench.memory.write(gpa, data)
    assert bench.device_reads(gpa) == data, f"the device did not read {region.name} at {gpa:#x}"
    other = pattern()
    bench.device_writes(gpa, other)
    expected = other if region.kind is RegionKind.RAM else data
    assert bench.memory.read(gpa, 16) == expected, f"wrong bytes in {region.name} at {gpa:#x}"


def check_unreachable(bench: Bench, gpa: int) -> None:
    """What the device writes to ``gpa`` it cannot read back."""
    data = pattern()
    bench.device_writes(gpa, data)
    bench.memory.write(SCRATCH, bytes(16))
    bench.edu.load(SCRATCH)
    assert bench.device_reads(gpa) != data, f"the device reaches {gpa:#x}"


@pytest.fixture(scope="module", params=NAMES)
def bench(request: pytest.FixtureRequest, edu: str) -> Iterator[Bench]:
    mode = MODES[request.param]
    with host.borrow(edu), machines_use(mode), Machine(memory="64M") as machine:
        machine.memory.add_rom(ROM_AT, b"rom" * 5000)
        machine.memory.add_ram(4 * GIB, 64 * MIB, "ram1")
        yield Bench(machine, Edu(machine.assign(edu)), mode)
        machine.audit()


def edges(memory: GuestMemory) -> list[tuple[MemoryRegion, int]]:
    return [(region, gpa) for region in memory if region.kind.dma for gpa in (region.gpa, region.range.end - 16)]


def test_first_and_last_page_of_every_region(bench: Bench) -> None:
    names = [region.name for region in bench.memory if region.kind.dma]
    assert names == ["ram0", "rom", "ram1"]
    for region, gpa in edges(bench.memory):
        check_reaches(bench, region, gpa)


def test_nothing_outside(bench: Bench) -> None:
    """The pages before and after each region, the hole, above RAM, far away, and reserved addresses."""
    outside = {region.range.end for region in bench.memory} | {region.gpa - PAGE for region in bench.memory}
    outside |= {0xD000_0000, 0xFEC0_0000, bench.machine.layout.mmio64.start, 1 << 38}
    outside = {gpa for gpa in outside if gpa >= 0 and bench.memory.find(gpa) is None}
    assert len(outside) >= 8
    for gpa in sorted(outside):
        check_unreachable(bench, gpa)


def test_devices_read_rom_and_cannot_write_it(bench: Bench) -> None:
    before = bench.memory.read(ROM_AT, PAGE)
    bench.device_writes(ROM_AT + 32, pattern())
    assert bench.memory.read(ROM_AT, PAGE) == before
    assert bench.device_reads(ROM_AT) == before[:16]


def test_locked_memory_is_guest_memory(bench: Bench) -> None:
    assert bench.mode.locked() == sum(region.size for region in bench.memory if region.kind.dma)


def test_the_emulated_iommu_agrees(bench: Bench, iommu_trace: Path | None) -> None:
    if iommu_trace is None:
        pytest.skip(f"real hardware has no translation trace: {LAB_ONLY}")
    for region, gpa in edges(bench.memory):
        offset = iommu_trace.stat().st_size
        bench.edu.load(gpa)
        wanted = physical("self", region.hva + gpa - region.gpa)
        seen = dict(translations(iommu_trace, bench.edu.bdf, offset))
        assert same_page(gpa, wanted, seen[gpa]), f"{gpa:#x}: {seen[gpa]:#x}, expected {wanted:#x}"
    offset = iommu_trace.stat().st_size
    bench.edu.load(0xD000_0000)
    assert {hpa for _, hpa in translations(iommu_trace, bench.edu.bdf, offset)} == {0}


CANARY = """
import ctypes, mmap, sys
pages = mmap.mmap(-1, 64 << 20)
for at in range(0, len(pages), 4096):
    pages[at:at + 16] = b"canary of others"
print(ctypes.addressof(ctypes.c_char.from_buffer(pages)), flush=True)
sys.stdin.readline()
print(all(pages[at:at + 16] == b"canary of others" for at in range(0, len(pages), 4096)), flush=True)
"""


def test_devices_do_not_reach_another_process(edu2: str) -> None:
    """DMA to the host-physical address of another process's page neither changes nor reads it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CANARY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin and process.stdout
        address = int(process.stdout.readline())
        with host.borrow(edu2), Machine(memory="32M") as machine:
            bench = Bench(machine, Edu(machine.assign(edu2)))
            pages = (physical(process.pid, address + at) for at in range(0, 64 * MIB, MIB))
            target = next(hpa for hpa in pages if hpa > 64 * MIB)
            data = pattern()
            bench.device_writes(target, data)
            copies = bytes(machine.memory.view(0, 32 * MIB)).count(data)
            assert copies == 1, "it must lie in the scratch page, where it came from, and nowhere else"
            assert bench.device_reads(target) != b"canary of others"
        print("done", file=process.stdin, flush=True)
        assert process.stdout.readline().strip() == "True"
    finally:
        process.kill()
        process.communicate()


@through_compat_too
def test_tracepoints_agree_with_the_ledger(mode: Mode, edu2: str) -> None:
    """What the kernel mapped and unmapped for this process is what the ledger says, and nothing more."""
    calls: Calls = []
    with host.borrow(edu2), Machine(memory="64M", backend=recording(calls, mode.backend)) as machine:
        machine.memory.add_rom(ROM_AT, bytes(3 * PAGE))
        with iommu_events() as events:
            device = machine.assign(edu2)
            extra = machine.memory.add_ram(ROM_AT + 16 * MIB, 4 * MIB, "extra")
            machine.memory.remove(extra)
            machine.deassign(device)
    assert [operation for operation, _ in calls] == ["map", "map", "map", "unmap", "unmap", "unmap"]
    without_probe(events)
    for operation in ("map", "unmap"):
        ledger = merged([range_ for name, range_ in calls if name == operation])
        seen = merged([range_ for name, range_ in events if name == operation])
        assert seen == ledger


def test_a_region_in_a_reserved_range_is_refused(bench: Bench) -> None:
    before = bench.machine.domain.ledger, bench.machine.memslots.ledger
    with pytest.raises(ReservedRange, match="0xfee00000-0xfeefffff msi"):
        bench.memory.add_ram(0xFEE0_0000, MIB)
    assert (bench.machine.domain.ledger, bench.machine.memslots.ledger) == before
    bench.machine.audit()


# --- planted bugs: the checks above must catch them


def test_a_dropped_unmap_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench.machine.domain.backend
    gpa = 5 * GIB
    region = bench.memory.add_ram(gpa, PAGE, "extra")
    check_reaches(bench, region, gpa)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "unmap", lambda region: region.size)
        bench.memory.remove(region)
    try:
        with pytest.raises(AssertionError, match="the device reaches"):
            check_unreachable(bench, gpa)
    finally:
        assert backend.unmap(region) == PAGE
    check_unreachable(bench, gpa)


def test_an_iova_that_is_off_by_a_page_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bench.machine.domain.backend
    real, gpa = backend.map, 5 * GIB

    def shifted(region: MemoryRegion) -> MemoryRegion:
        return replace(region, range=Range(region.gpa + PAGE, region.size))

    with monkeypatch.context() as patch:
        patch.setattr(backend, "map", lambda region: real(shifted(region)))
        region = bench.memory.add_ram(gpa, 2 * PAGE, "extra")
    try:
        with pytest.raises(AssertionError):
            check_reaches(bench, region, gpa)
    finally:
        assert backend.unmap(shifted(region)) == 2 * PAGE
        with monkeypatch.context() as patch, pytest.raises(AuditFailed, match="0x0 bytes were mapped"):
            patch.setattr(Domain, "region_added", lambda self, region: None)
            bench.memory.remove(region)
        bench.machine.memory._regions = tuple(r for r in bench.memory if r is not region)
        region.mapping.close()
        bench.machine.memslots.region_removed(region)


def test_the_audit_reports_missing_and_unexpected_mappings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Domain, "map_region", lambda self, region: None)
        region = bench.memory.add_ram(5 * GIB, PAGE, "unmapped")
    with pytest.raises(AuditFailed, match="missing 0x140000000"):
        bench.machine.audit()
    bench.memory.remove(region)
    bench.machine.audit()
    with monkeypatch.context() as patch:
        patch.setattr(bench.machine.domain, "region_removed", lambda region: None)
        region = bench.memory.add_ram(5 * GIB, PAGE, "left")
        patch.setattr(Domain, "region_removed", lambda self, region: None)
        bench.memory.remove(region)
    with pytest.raises(AuditFailed, match="unexpected 0x140000000"):
        bench.machine.audit()
    bench.machine.domain.unmap_region(region)
    bench.machine.audit()


def test_memory_is_congruent_for_large_pages(bench: Bench) -> None:
    for region in bench.memory:
        if region.kind is RegionKind.RAM:
            assert (region.hva - region.gpa) % (2 * MIB) == 0
