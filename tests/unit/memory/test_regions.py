"""The list of regions: refusals, the order of listeners, and which memory stays mapped after a failure."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmpass.memory.regions
from kvmpass.errors import AuditFailed, Closed, LayoutError
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import HUGE, Backing, GuestMemory, HostMapping, MemoryRegion, RegionKind


class Mirror:
    """A listener that keeps its regions, and refuses the calls named in ``refusing``."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.regions: list[MemoryRegion] = []
        self.refusing: set[str] = set()

    def _step(self, what: str, name: str) -> None:
        if what in self.refusing:
            raise OSError(errno.ENOMEM, f"{self.name} refuses {name}")
        self.log.append(f"{self.name} {what} {name}")

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        self._step("wanted", f"{kind.value} {range_} {name}")

    def region_added(self, region: MemoryRegion) -> None:
        self._step("added", region.name)
        self.regions.append(region)

    def region_removed(self, region: MemoryRegion) -> None:
        self._step("removed", region.name)
        self.regions.remove(region)

    def holds(self, region: MemoryRegion) -> bool:
        return region in self.regions


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("kvmpass-test", os.MFD_CLOEXEC)
    os.truncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def bar() -> Iterator[HostMapping]:
    mapping = HostMapping(4 * PAGE)
    yield mapping
    mapping.close()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def mirrors(memory: GuestMemory, log: list[str]) -> list[Mirror]:
    made = [Mirror(name, log) for name in ("first", "second", "third")]
    for mirror in made:
        memory.listen(mirror)
    log.clear()
    return made


# --- kinds


def test_access_by_kind() -> None:
    """The guest writes RAM and BARs, devices write RAM and read ROM; a BAR they reach only in a domain with p2p."""
    kinds = {kind.value: (kind.guest_writable, kind.dma, kind.dma_writable) for kind in RegionKind}
    assert kinds == {
        "ram": (True, True, True),
        "rom": (False, True, False),
        "bar": (True, False, True),
        "registers": (False, False, False),
    }


def test_a_region_is_its_mapping_from_its_offset_on(bar: HostMapping) -> None:
    whole = MemoryRegion(RegionKind.BAR, Range(GIB, PAGE), bar, name="it")
    part = MemoryRegion(RegionKind.BAR, Range(GIB, PAGE), bar, offset=PAGE, name="it")
    assert (whole.hva, part.hva, whole.gpa, whole.size) == (bar.address, bar.address + PAGE, GIB, PAGE)
    assert whole.backing is Backing.ANONYMOUS


def test_repr_of_a_region(memory: GuestMemory) -> None:
    assert repr(memory.add_ram(MIB, PAGE, "low")) == "<low ram 0x100000-0x100fff>"


# --- alignment and overlaps


@pytest.mark.parametrize("start", [1, PAGE - 1, PAGE + 1, -PAGE, -1])
def test_addresses_are_pages(memory: GuestMemory, bar: HostMapping, memfd: int, start: int) -> None:
    for add in (
        lambda: memory.add_ram(start, PAGE, "it"),
        lambda: memory.add_rom(start, b"x", "it"),
        lambda: memory.add_bar(start, PAGE, bar, 0, "it"),
        lambda: memory.add_shared(start, memfd, PAGE, name="it"),
    ):
        with pytest.raises(LayoutError, match=r"it: .* is not whole pages of 4096 bytes"):
            add()
    assert len(memory) == 0


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, -PAGE, -1])
def test_sizes_are_pages(memory: GuestMemory, bar: HostMapping, memfd: int, size: int) -> None:
    for add in (
        lambda: memory.add_ram(MIB, size),
        lambda: memory.add_bar(MIB, size, bar, 0, "it"),
        lambda: memory.add_shared(MIB, memfd, size),
    ):
        with pytest.raises(LayoutError, match="whole pages of 4096 bytes"):
            add()
    assert len(memory) == 0


def test_an_empty_rom_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(LayoutError, match="whole pages"):
        memory.add_rom(MIB, b"")
    assert memory.add_rom(MIB, b"x" * PAGE).size == PAGE
    assert memory.add_rom(GIB, b"x" * (PAGE + 1)).size == 2 * PAGE


def test_a_page_of_a_pool_is_larger(memory: GuestMemory) -> None:
    for gpa, size in ((HUGE, MIB), (MIB, HUGE), (HUGE + PAGE, HUGE)):
        with pytest.raises(LayoutError, match="whole pages of 2 MiB"):
            memory.add_ram(gpa, size, backing=Backing.HUGETLB_2M)


def test_neighbours_touch_and_never_overlap(memory: GuestMemory) -> None:
    memory.add_ram(4 * PAGE, 4 * PAGE, "middle")
    for gpa, size in ((3 * PAGE, 2 * PAGE), (4 * PAGE, PAGE), (7 * PAGE, PAGE), (5 * PAGE, PAGE), (0, 16 * PAGE)):
        with pytest.raises(LayoutError, match=r"new .* overlaps middle 0x4000-0x7fff"):
            memory.add_ram(gpa, size, "new")
    memory.add_ram(8 * PAGE, PAGE, "above")
    memory.add_rom(0, bytes(4 * PAGE), "below")
    assert [region.name for region in memory] == ["below", "middle", "above"]
    assert len(memory) == 3


def test_ram_has_no_shared_or_device_backing(memory: GuestMemory) -> None:
    for backing in (Backing.SHARED, Backing.DEVICE):
        with pytest.raises(LayoutError, match=f"{backing} memory is not made here"):
            memory.add_ram(0, PAGE, backing=backing)


# --- backings


def test_host_addresses_suit_large_pages_of_the_iommu(memory: GuestMemory, memfd: int, bar: HostMapping) -> None:
    """Congruent modulo 2 MiB, for each backing."""
    regions = [
        memory.add_ram(GIB + 3 * PAGE, PAGE),
        memory.add_rom(GIB + MIB + PAGE, b"x"),
        memory.add_shared(2 * GIB + 5 * PAGE, memfd, PAGE, MIB),
    ]
    assert all((region.hva - region.gpa) % HUGE == 0 for region in regions)
    part = memory.add_bar(3 * GIB, PAGE, bar, 2 * PAGE, "bar")
    assert part.hva == bar.address + 2 * PAGE


def test_large_regions_ask_for_huge_pages(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(HostMapping, "advise_huge", lambda self: asked.append(self.size))
    for n, size in enumerate((PAGE, HUGE - PAGE, HUGE, HUGE + PAGE, 4 * HUGE)):
        memory.add_ram(n * GIB, size)
    assert asked == [HUGE, HUGE + PAGE, 4 * HUGE]


@pytest.mark.parametrize("backing, page", [(Backing.HUGETLB_2M, HUGE), (Backing.HUGETLB_1G, GIB)])
def test_regions_from_a_pool(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, backing: Backing, page: int
) -> None:
    """The pool is asked first; the mapping comes from it, and is not advised: it has huge pages already."""
    steps: list[Any] = []

    class Mapping:
        def __init__(self, size: int, **options: int) -> None:
            steps.append((size, options))

        def advise_huge(self) -> None:
            steps.append("advised")

        def close(self) -> None: ...

    monkeypatch.setattr(kvmpass.memory.regions, "HostMapping", Mapping)
    monkeypatch.setattr(kvmpass.memory.regions, "check_huge_pages", lambda *what: steps.append(what))
    region = memory.add_ram(2 * page, page, backing=backing)
    assert steps == [(page, page), (page, {"align": page, "congruent": 2 * page, "fd": -1, "page": page})]
    assert (region.backing, memory.ordinary_size, memory.ram_size) == (backing, 0, page)


def test_memory_for_daemons(memory: GuestMemory) -> None:
    """A memfd that another process maps, at a congruent address while the region exists: ordinary memory."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    region = memory.add_ram(5 * PAGE, 4 * MIB, "ram3", backing=Backing.MEMFD)
    assert (region.backing, region.kind, region.file_offset) == (Backing.MEMFD, RegionKind.RAM, 0)
    assert (region.hva - region.gpa) % HUGE == 0
    assert (memory.ordinary_size, memory.ram_size) == (4 * MIB, 4 * MIB)
    with mmap.mmap(region.file, 4 * MIB) as peer:
        peer[PAGE : PAGE + 5] = b"hello"
        assert memory.read(6 * PAGE, 5) == b"hello"
    memory.remove(region)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("failing", ["HostMapping", "check_huge_pages"])
def test_no_memfd_is_left_without_its_region(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no")

    monkeypatch.setattr(kvmpass.memory.regions, failing, fail)
    before = len(list(Path("/proc/self/fd").iterdir()))
    backing = Backing.MEMFD if failing == "HostMapping" else Backing.MEMFD_2M
    with pytest.raises(OSError, match="no"):
        memory.add_ram(0, HUGE, backing=backing)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_listener_that_refuses_leaves_no_memfd(memory: GuestMemory) -> None:
    """Nor does one that has gone: it is not called any more."""
    log: list[str] = []
    mirror = Mirror("it", log)
    memory.listen(mirror)
    mirror.refusing = {"added"}
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="it refuses"):
        memory.add_ram(0, PAGE, backing=Backing.MEMFD)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    memory.unlisten(mirror)
    memory.unlisten(mirror)
    log.clear()
    memory.add_ram(0, PAGE, backing=Backing.MEMFD)
    assert log == []


def test_a_part_of_a_file(memory: GuestMemory, memfd: int) -> None:
    os.pwrite(memfd, b"at two", 2 * MIB)
    region = memory.add_shared(0, memfd, MIB, 2 * MIB, "named")
    assert (region.name, region.kind, memory.read(0, 6)) == ("named", RegionKind.RAM, b"at two")
    other = memory.add_shared(MIB, memfd, MIB, 2 * MIB, writable=False)
    assert (other.kind, other.kind.guest_writable, other.name) == (RegionKind.ROM, False, "shared")
    memory.write(0, b"change")
    assert memory.read(MIB, 6) == b"change" == os.pread(memfd, 6, 2 * MIB)


# --- listeners


def test_all_listeners_are_asked_then_called(memory: GuestMemory, mirrors: list[Mirror], log: list[str]) -> None:
    region = memory.add_rom(MIB, b"x", "it")
    names = ("first", "second", "third")
    assert log == [f"{n} wanted rom 0x100000-0x100fff it" for n in names] + [f"{n} added it" for n in names]
    log.clear()
    memory.remove(region)
    assert log == [f"{name} removed it" for name in reversed(names)]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_listener_refuses_a_region_before_it_is_mapped(
    memory: GuestMemory, mirrors: list[Mirror], log: list[str], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    mirrors[at].refusing = {"wanted"}
    monkeypatch.setattr(HostMapping, "__init__", lambda *_, **__: pytest.fail("something was mapped"))
    with pytest.raises(OSError, match="refuses"):
        memory.add_ram(0, PAGE, "it")
    assert (len(memory), [line for line in log if "added" in line]) == (0, [])


def tracked(monkeypatch: pytest.MonkeyPatch) -> list[HostMapping]:
    """Mappings that are open."""
    alive: list[HostMapping] = []
    made, closed = HostMapping.__init__, HostMapping.close

    def init(self: HostMapping, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        alive.append(self)

    def close(self: HostMapping) -> None:
        closed(self)
        alive[:] = [mapping for mapping in alive if mapping is not self]

    monkeypatch.setattr(HostMapping, "__init__", init)
    monkeypatch.setattr(HostMapping, "close", close)
    return alive


ADDS: dict[str, Callable[[GuestMemory, int], MemoryRegion]] = {
    "ram": lambda memory, fd: memory.add_ram(MIB, PAGE, "it"),
    "rom": lambda memory, fd: memory.add_rom(MIB, b"x", "it"),
    "shared": lambda memory, fd: memory.add_shared(MIB, fd, PAGE, name="it"),
}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_a_failing_listener_undoes_the_others(
    memory: GuestMemory,
    mirrors: list[Mirror],
    log: list[str],
    memfd: int,
    monkeypatch: pytest.MonkeyPatch,
    add: Callable[[GuestMemory, int], MemoryRegion],
    at: int,
) -> None:
    alive = tracked(monkeypatch)
    mirrors[at].refusing = {"added"}
    with pytest.raises(OSError, match=f"{mirrors[at].name} refuses it"):
        add(memory, memfd)
    done = [mirror.name for mirror in mirrors[:at]]
    assert log[3:] == [f"{name} added it" for name in done] + [f"{name} removed it" for name in reversed(done)]
    assert (len(memory), alive, [mirror.regions for mirror in mirrors]) == (0, [], [[], [], []])
    mirrors[at].refusing = set()
    region = add(memory, memfd)
    assert list(memory) == [region] == alive_region(alive, region)
    memory.remove(region)
    assert alive == []


def alive_region(alive: list[HostMapping], region: MemoryRegion) -> list[MemoryRegion]:
    return [region] if [mapping.address for mapping in alive] == [region.hva] else []


def test_memory_that_a_listener_may_still_use_stays_mapped(
    memory: GuestMemory, mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = tracked(monkeypatch)
    mirrors[0].refusing = {"removed"}
    mirrors[2].refusing = {"added"}
    with pytest.raises(OSError, match="third refuses it") as refused:
        memory.add_ram(0, PAGE, "it")
    assert "first refuses it" in refused.value.__notes__[0]
    assert len(alive) == 1
    assert mirrors[0].regions[0].hva == alive[0].address
    assert mirrors[1].regions == []
    assert list(memory) == mirrors[0].regions, "it stays in the list"
    with pytest.raises(AuditFailed, match=r"still in use, and therefore not unmapped: it 0x0-0xfff"):
        memory.close()
    mirrors[0].refusing = set()
    mirrors[0].regions.clear()
    memory.close()
    assert alive == []


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_removal_adds_the_region_again(
    memory: GuestMemory, mirrors: list[Mirror], log: list[str], at: int
) -> None:
    region = memory.add_ram(0, PAGE, "it")
    mirrors[at].refusing = {"removed"}
    log.clear()
    with pytest.raises(OSError, match=f"{mirrors[at].name} refuses it"):
        memory.remove(region)
    done = [mirror.name for mirror in mirrors[:at:-1]]
    assert log == [f"{name} removed it" for name in done] + [f"{name} added it" for name in reversed(done)]
    assert list(memory) == [region]
    assert all(mirror.regions == [region] for mirror in mirrors)
    memory.write(0, b"still there")
    mirrors[at].refusing = set()
    memory.remove(region)
    assert len(memory) == 0
    with pytest.raises(Closed):
        _ = region.hva


def test_a_region_of_another_memory(memory: GuestMemory) -> None:
    other = GuestMemory()
    region = other.add_ram(MIB, PAGE, "theirs")
    memory.add_ram(MIB, PAGE, "ours")
    with pytest.raises(LayoutError, match="theirs 0x100000-0x100fff is not in this memory"):
        memory.remove(region)
    other.remove(region)
    with pytest.raises(LayoutError, match="is not in this memory"):
        other.remove(region)
    assert [kept.name for kept in memory] == ["ours"]


def test_a_new_listener_gets_all_regions_by_address(memory: GuestMemory, log: list[str]) -> None:
    memory.add_ram(GIB, PAGE, "high")
    memory.add_rom(MIB, b"x", "low")
    memory.listen(late := Mirror("late", log))
    late.regions, mirrored = [], late.regions
    assert [region.name for region in mirrored] == ["low", "high"]
    assert log == [
        "late wanted rom 0x100000-0x100fff low",
        "late added low",
        "late wanted ram 0x40000000-0x40000fff high",
        "late added high",
    ]


@pytest.mark.parametrize("refusing", ["wanted", "added"])
def test_a_listener_that_refuses_is_not_registered(memory: GuestMemory, log: list[str], refusing: str) -> None:
    memory.add_ram(0, PAGE, "low")
    mirror = Mirror("late", log)
    real = mirror._step

    def second_time(what: str, name: str) -> None:
        if what == refusing and "high" in name:
            mirror.refusing = {refusing}
        real(what, name)
        mirror.refusing = set()

    memory.add_ram(GIB, PAGE, "high")
    mirror._step = second_time  # type: ignore[method-assign]
    with pytest.raises(OSError, match="late refuses"):
        memory.listen(mirror)
    assert mirror.regions == []
    assert log[-1] == "late removed low"
    log.clear()
    memory.add_ram(2 * GIB, PAGE)
    assert log == []


def test_close_unmaps_all_and_calls_no_listener(
    memory: GuestMemory, mirrors: list[Mirror], log: list[str], bar: HostMapping
) -> None:
    ram = memory.add_ram(0, PAGE)
    memory.add_bar(GIB, PAGE, bar, 0, "bar")
    log.clear()
    for mirror in mirrors:
        mirror.regions.clear()
    memory.close()
    assert (log, len(memory)) == ([], 0)
    with pytest.raises(Closed):
        _ = ram.hva
    assert bar.address, "that is its device's"
    memory.close()
    memory.add_ram(0, PAGE)
    assert log == []


# --- bytes


def test_accesses_end_where_the_region_does(memory: GuestMemory, bar: HostMapping) -> None:
    """Also where the next region begins: one access is one region's."""
    memory.add_ram(MIB, 2 * PAGE, "low")
    memory.add_ram(MIB + 2 * PAGE, PAGE, "next")
    memory.add_bar(GIB, PAGE, bar, 0, "bar")
    low, end = MIB, MIB + 2 * PAGE
    memory.write(low, b"first")
    memory.write(end - 4, b"last")
    assert (memory.read(low, 5), memory.read(end - 4, 4)) == (b"first", b"last")
    assert len(memory.view(low, 2 * PAGE)) == 2 * PAGE
    memory.write(end, b"next")
    for gpa, size in (
        (low - 1, 1),
        (low - 1, 2),
        (end - 1, 2),
        (low, 2 * PAGE + 1),
        (end + PAGE, 1),
        (GIB, 1),
        (0, 1),
    ):
        with pytest.raises(IndexError, match=re.escape(f"guest-physical {gpa:#x}+{size:#x} is not in one region")):
            memory.read(gpa, size)
        with pytest.raises(IndexError):
            memory.write(gpa, bytes(size))
    assert memory.read(end - 4, 4) == b"last"


def test_find_by_address(memory: GuestMemory, bar: HostMapping) -> None:
    ram, rom = memory.add_ram(MIB, PAGE), memory.add_rom(2 * MIB, b"x")
    memory.add_bar(GIB, PAGE, bar, 0, "bar")
    wanted = {MIB - 1: None, MIB: ram, MIB + PAGE - 1: ram, MIB + PAGE: None, 2 * MIB: rom, GIB: None}
    assert {gpa: memory.find(gpa) for gpa in wanted} == wanted


def test_the_host_writes_rom_but_no_read_only_file(memory: GuestMemory, memfd: int) -> None:
    memory.add_rom(0, b"old")
    memory.write(0, b"new")
    assert memory.read(0, 3) == b"new"
    memory.add_shared(MIB, memfd, PAGE, writable=False)
    with pytest.raises(PermissionError, match="guest-physical 0x100004 is a read-only file"):
        memory.write(MIB + 4, b"x")


def test_populate_skips_bars(memory: GuestMemory, bar: HostMapping, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[HostMapping] = []
    monkeypatch.setattr(HostMapping, "populate", lambda self, stopped: filled.append(self))
    ram, rom = memory.add_ram(0, PAGE), memory.add_rom(MIB, b"x")
    memory.add_bar(GIB, PAGE, bar, 0, "bar")
    memory.populate()
    assert filled == [ram.mapping, rom.mapping]


def test_sizes_by_backing(memory: GuestMemory, memfd: int, bar: HostMapping) -> None:
    """The host's free memory must hold the anonymous regions, ROM too."""
    memory.add_ram(0, 3 * PAGE)
    memory.add_ram(MIB, 2 * PAGE)
    memory.add_rom(2 * MIB, b"x")
    memory.add_shared(3 * MIB, memfd, PAGE)
    memory.add_shared(4 * MIB, memfd, PAGE, writable=False)
    memory.add_bar(GIB, PAGE, bar, 0, "bar")
    assert (memory.ram_size, memory.ordinary_size) == (6 * PAGE, 6 * PAGE)


def test_the_list_may_change_during_an_iteration(memory: GuestMemory) -> None:
    regions = [memory.add_ram(n * MIB, PAGE) for n in range(4)]
    seen = []
    for region in memory:
        seen.append(region)
        if region is regions[1]:
            memory.remove(regions[2])
    assert seen == regions


def test_removed_regions_leave_no_descriptors(memory: GuestMemory) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        memory.remove(memory.add_ram(0, HUGE))
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
