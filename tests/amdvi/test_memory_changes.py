"""Regions are added and removed during DMA: the ledgers are right throughout, and empty at the end."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.modes import MODES, NAMES, Mode, machines_use
from support.witness import Edu, pattern

from kvmpass import host
from kvmpass.errors import NotEnoughMemory
from kvmpass.host.backend import choose_backend
from kvmpass.layout import GIB, MIB, PAGE
from kvmpass.machine import Machine
from kvmpass.memory import Backing, GuestMemory, MemoryRegion, RegionKind

# KVMPASS_SOAK=1 is for a night, any other number is the number itself.
ROUNDS = {"": 20, "1": 1000}.get(os.environ.get("KVMPASS_SOAK", ""), 0) or int(os.environ["KVMPASS_SOAK"])
PLACE = 5 * GIB
HUGE_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
SCRATCH, ECHO = 0x10_0000, 0x20_0000


class Bench:
    """A machine with the edu device, which does DMA for one thread at a time."""

    def __init__(self, machine: Machine, edu: Edu, mode: Mode) -> None:
        self.machine, self.edu, self.mode = machine, edu, mode
        self.lock = threading.Lock()

    @property
    def memory(self) -> GuestMemory:
        return self.machine.memory

    def device_copies(self, source: int, target: int) -> None:
        """Copy 16 bytes of guest memory, by DMA."""
        with self.lock:
            self.edu.load(source)
            self.edu.store(target)

    def check_reaches(self, region: MemoryRegion) -> None:
        """Let the device read the last bytes of ``region``, and write them if it is RAM."""
        at = region.range.end - 16
        data = self.memory.read(at, 16)
        if region.kind is RegionKind.RAM:
            data = pattern()
            self.memory.write(at, data)
        self.device_copies(at, SCRATCH)
        assert self.memory.read(SCRATCH, 16) == data, f"the device does not read {region}"
        other = pattern()
        self.memory.write(SCRATCH, other)
        self.device_copies(SCRATCH, at)
        expected = other if region.kind is RegionKind.RAM else data
        assert self.memory.read(at, 16) == expected, f"wrong bytes in {region}"


class Worker(threading.Thread):
    """Keep the device busy: with a copy that is checked, and a write to regions that are added and removed."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(name="dma", daemon=True)
        self.bench = bench
        self.copies = 0
        self.error: BaseException | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                data = pattern()
                self.bench.memory.write(ECHO, data)
                self.bench.device_copies(ECHO, ECHO + PAGE)
                assert self.bench.memory.read(ECHO + PAGE, 16) == data
                self.bench.device_copies(ECHO, PLACE)
                self.copies += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(60)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module", params=NAMES if os.environ.get("KVMPASS_SOAK") else None)
def bench(request: pytest.FixtureRequest, edu: str) -> Iterator[Bench]:
    """All modes in the long form, else that of the kernel."""
    mode = MODES[getattr(request, "param", None) or choose_backend(host.Sysfs()).name]
    with host.borrow(edu), machines_use(mode), Machine(memory="16M") as machine:
        yield Bench(machine, Edu(machine.assign(edu)), mode)
        machine.audit()


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[int]:
    """The number of free huge pages of 2 MiB: eight at least, reserved for these tests if necessary."""
    pool, before = HUGE_POOL / "nr_hugepages", int((HUGE_POOL / "nr_hugepages").read_text())
    free = int((HUGE_POOL / "free_hugepages").read_text())
    try:
        if free < 8:
            pool.write_text(str(before + 8))
            free = int((HUGE_POOL / "free_hugepages").read_text())
        assert free >= 8, f"the kernel found {free} huge pages: memory is too fragmented, reboot this host"
        yield free
    finally:
        if int(pool.read_text()) != before:
            pool.write_text(str(before))


def memfd(size: int) -> int:
    fd = os.memfd_create("kvmpass-test")
    os.truncate(fd, size)
    return fd


def add_shared(memory: GuestMemory, writable: bool) -> MemoryRegion:
    fd = memfd(6 * MIB)
    try:
        return memory.add_shared(PLACE, fd, 3 * MIB, 2 * MIB, writable=writable)
    finally:
        os.close(fd)


KINDS: dict[str, Callable[[GuestMemory], MemoryRegion]] = {
    "ram": lambda memory: memory.add_ram(PLACE, 4 * MIB),
    "page": lambda memory: memory.add_ram(PLACE, PAGE),
    "rom": lambda memory: memory.add_rom(PLACE, b"rom" * 5000),
    "shared": lambda memory: add_shared(memory, True),
    "shared rom": lambda memory: add_shared(memory, False),
    "huge": lambda memory: memory.add_ram(PLACE, 4 * MIB, backing=Backing.HUGETLB_2M),
    "memfd": lambda memory: memory.add_ram(PLACE, 4 * MIB, backing=Backing.MEMFD),
    "huge memfd": lambda memory: memory.add_ram(PLACE, 4 * MIB, backing=Backing.MEMFD_2M),
}


def check_ledgers(bench: Bench) -> dict[str, Any]:
    """Check that the ledgers equal the list, and return what this process and the kernel hold."""
    machine = bench.machine
    machine.audit()
    assert bench.mode.locked() == sum(mapping.size for mapping in machine.domain.ledger)
    return {
        "descriptors": sorted(str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()),
        "memslots": machine.memslots.ledger,
        "mappings": machine.domain.ledger,
        "shared": len(re.findall(r"memfd:|hugepage", Path("/proc/self/maps").read_text())),
        "huge pages": (HUGE_POOL / "free_hugepages").read_text(),
    }


@pytest.mark.amdvi(timeout=3600)
@pytest.mark.usefixtures("huge_pages")
def test_regions_change_during_dma(bench: Bench) -> None:
    memory = bench.memory
    before = check_ledgers(bench)
    with Worker(bench) as worker:
        for number, (name, add) in enumerate(itertools.cycle(KINDS.items())):
            if worker.error or (number >= ROUNDS and worker.copies):
                break
            region = add(memory)
            check_ledgers(bench)
            assert region in list(memory)
            assert (region.hva - region.gpa) % (2 * MIB) == 0
            if number < len(KINDS):
                bench.check_reaches(region)
            memory.remove(region)
            assert check_ledgers(bench) == before, f"{name}, round {number}"
    assert check_ledgers(bench) == before


@pytest.mark.usefixtures("huge_pages")
def test_regions_are_added_and_removed_in_any_order(bench: Bench) -> None:
    before = check_ledgers(bench)
    regions = []
    for number in range(ROUNDS):
        gpa = PLACE + number * 16 * MIB
        regions.append(
            bench.memory.add_ram(gpa, MIB) if number % 2 else bench.memory.add_rom(gpa, number.to_bytes(2, "big"))
        )
    check_ledgers(bench)
    assert len(bench.machine.domain.ledger) == len(regions) + 1
    bench.check_reaches(regions[-1])
    for region in regions[::2] + regions[1::2][::-1]:
        bench.memory.remove(region)
    assert check_ledgers(bench) == before


def test_a_missing_unmap_is_detected(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug, which the kernel's count of locked memory shows."""
    region = bench.memory.add_ram(PLACE, MIB)
    backend = bench.machine.domain.backend
    with monkeypatch.context() as patch:
        patch.setattr(backend, "unmap", lambda region: region.size)
        bench.memory.remove(region)
    with pytest.raises(AssertionError):
        check_ledgers(bench)
    assert backend.unmap(region) == MIB
    check_ledgers(bench)


# --- huge pages


def kernel_page_size(address: int) -> int:
    """Bytes, as smaps has it for the mapping that starts at ``address``."""
    text = Path("/proc/self/smaps").read_text()
    match = re.search(rf"^{address:x}-.*?^KernelPageSize: +(\d+) kB", text, re.MULTILINE | re.DOTALL)
    assert match, f"no mapping starts at {address:#x}"
    return int(match[1]) * 1024


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_are_huge(bench: Bench) -> None:
    free = int((HUGE_POOL / "free_hugepages").read_text())
    region = bench.memory.add_ram(PLACE, 6 * MIB, backing=Backing.HUGETLB_2M)
    try:
        assert kernel_page_size(region.hva) == 2 * MIB
        assert int((HUGE_POOL / "free_hugepages").read_text()) == free - 3
        bench.check_reaches(region)
    finally:
        bench.memory.remove(region)
    assert int((HUGE_POOL / "free_hugepages").read_text()) == free


@pytest.mark.amdvi(profile="odd")
def test_a_huge_page_of_1_gib(bench: Bench) -> None:
    free = HUGE_POOL.parent / "hugepages-1048576kB" / "free_hugepages"
    if not free.exists() or int(free.read_text()) < 1:
        pytest.skip("no free page of 1 GiB: boot with hugepagesz=1G hugepages=1, on a CPU with pdpe1gb")
    before = free.read_text()
    region = bench.memory.add_ram(8 * GIB, GIB, backing=Backing.HUGETLB_1G)
    assert (region.hva % GIB, kernel_page_size(region.hva)) == (0, GIB)
    bench.check_reaches(region)
    bench.machine.audit()
    assert bench.mode.locked() == GIB + 16 * MIB
    bench.memory.remove(region)
    assert free.read_text() == before


@pytest.mark.usefixtures("huge_pages")
def test_shared_huge_pages(bench: Bench) -> None:
    fd = os.memfd_create("kvmpass-test", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.truncate(fd, 4 * MIB)
        region = bench.memory.add_shared(PLACE, fd, 2 * MIB, 2 * MIB)
    finally:
        os.close(fd)
    assert kernel_page_size(region.hva) == 2 * MIB
    bench.check_reaches(region)
    bench.memory.remove(region)


def test_more_huge_pages_than_available(bench: Bench, huge_pages: int) -> None:
    before = check_ledgers(bench)
    free = huge_pages - int((HUGE_POOL / "resv_hugepages").read_text())
    with pytest.raises(NotEnoughMemory, match=rf"{free + 1} huge pages of 2 MiB are needed, {free} are free"):
        bench.memory.add_ram(PLACE, (free + 1) * 2 * MIB, backing=Backing.HUGETLB_2M)
    assert check_ledgers(bench) == before


# --- memory that another process has too

PEER = """
import mmap, sys
pages = mmap.mmap(int(sys.argv[1]), 4096, offset=int(sys.argv[2]))
print(pages[:16].hex(), flush=True)
sys.stdin.readline()
pages[:16] = bytes.fromhex(sys.argv[3])
print("done", flush=True)
sys.stdin.readline()
"""


def test_another_process_sees_the_devices_dma(bench: Bench) -> None:
    fd = memfd(4 * MIB)
    region = bench.memory.add_shared(PLACE, fd, 2 * MIB, MIB)
    data, answer = pattern(), pattern()
    bench.memory.write(SCRATCH, data)
    bench.device_copies(SCRATCH, region.range.end - PAGE)
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER, str(fd), str(3 * MIB - PAGE), answer.hex()],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(fd)
    try:
        assert peer.stdin and peer.stdout
        assert peer.stdout.readline().strip() == data.hex(), "what the device wrote is not what the peer sees"
        print(file=peer.stdin, flush=True)
        assert peer.stdout.readline().strip() == "done"
        bench.device_copies(region.range.end - PAGE, SCRATCH)
        assert bench.memory.read(SCRATCH, 16) == answer, "what the peer wrote is not what the device sees"
    finally:
        peer.kill()
        peer.communicate()
        bench.memory.remove(region)


def test_a_device_cannot_write_a_read_only_file(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(bytes(range(256)) * 32)
    fd = os.open(tmp_path / "rom", os.O_RDONLY)
    region = bench.memory.add_shared(PLACE, fd, 2 * PAGE, writable=False)
    os.close(fd)
    bench.check_reaches(region)
    bench.memory.remove(region)
    assert (tmp_path / "rom").read_bytes() == bytes(range(256)) * 32
