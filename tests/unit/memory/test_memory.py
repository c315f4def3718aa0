"""The list of regions, its bytes, backings and listeners."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmpass.memory.mapping
from kvmpass.errors import AuditFailed, Closed, LayoutError, NotEnoughMemory
from kvmpass.hugepages import POOLS
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import HUGE, Backing, GuestMemory, HostMapping, MemoryRegion, RegionKind


class Listener:
    def __init__(self, name: str, log: list[str], refuse: bool = False) -> None:
        self.name, self.log, self.refuse = name, log, refuse
        self.held: list[MemoryRegion] = []

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        if name == "unwanted":
            raise LayoutError("not here")

    def region_added(self, region: MemoryRegion) -> None:
        if self.refuse:
            raise OSError("no")
        self.held.append(region)
        self.log.append(f"{self.name}+{region.name}")

    def region_removed(self, region: MemoryRegion) -> None:
        self.held.remove(region)
        self.log.append(f"{self.name}-{region.name}")

    def holds(self, region: MemoryRegion) -> bool:
        return region in self.held


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.close()


def test_bytes_by_guest_physical_address(memory: GuestMemory) -> None:
    memory.add_ram(0, MIB)
    memory.add_ram(4 * GIB, MIB)
    memory.write(4 * GIB + MIB - 4, b"last")
    assert memory.read(4 * GIB + MIB - 4, 4) == b"last"
    for gpa, size in ((MIB - 2, 4), (MIB, 1), (-1, 1), (2 * GIB, 1), (4 * GIB - 1, 2)):
        with pytest.raises(IndexError):
            memory.read(gpa, size)
        with pytest.raises(IndexError):
            memory.write(gpa, bytes(size))


def test_host_addresses_agree_modulo_2_mib(memory: GuestMemory) -> None:
    for gpa in (0, 3 * MIB, 4 * GIB + PAGE):
        region = memory.add_ram(gpa, 2 * MIB)
        assert (region.hva - gpa) % HUGE == 0


def test_rom_is_whole_pages_and_not_writable_for_the_guest(memory: GuestMemory) -> None:
    rom = memory.add_rom(GIB, b"x" * 5000)
    assert (rom.size, rom.kind.guest_writable, rom.kind.dma) == (2 * PAGE, False, True)
    assert memory.read(GIB + 4999, 2) == b"x\0"


def test_overlaps_and_fractions_are_refused(memory: GuestMemory) -> None:
    memory.add_ram(MIB, MIB)
    for gpa, size in ((0, MIB + PAGE), (2 * MIB - PAGE, PAGE), (MIB + PAGE, PAGE)):
        with pytest.raises(LayoutError, match="overlaps ram"):
            memory.add_ram(gpa, size)
    for gpa, size in ((100, PAGE), (0, 100), (8 * MIB, PAGE + 1), (0, 0), (PAGE, -PAGE), (-PAGE, PAGE)):
        with pytest.raises(LayoutError, match="whole pages"):
            memory.add_ram(gpa, size)
    for gpa, size in ((1 << 64, PAGE), (1 << 52, PAGE), ((1 << 52) - PAGE, 2 * PAGE), (0, 1 << 65)):
        with pytest.raises(LayoutError, match="beyond 52 bits"):
            memory.add_ram(gpa, size)
    assert len(memory) == 1


def test_listeners_are_called_in_order_and_undone_in_reverse(memory: GuestMemory) -> None:
    log: list[str] = []
    first, second = Listener("a", log), Listener("b", log)
    memory.add_ram(0, PAGE, "r0")
    memory.listen(first)
    memory.listen(second)
    assert log == ["a+r0", "b+r0"]
    region = memory.add_ram(PAGE, PAGE, "r1")
    memory.remove(region)
    assert log[2:] == ["a+r1", "b+r1", "b-r1", "a-r1"]
    second.refuse = True
    with pytest.raises(OSError, match="no"):
        memory.add_ram(PAGE, PAGE, "r2")
    assert log[6:] == ["a+r2", "a-r2"]
    assert [region.name for region in memory] == ["r0"]
    with pytest.raises(AuditFailed, match=r"still in use, and therefore not unmapped: r0 0x0-0xfff"):
        memory.close()
    assert memory.read(0, 4) == bytes(4), "it is still mapped"
    first.held.clear()
    second.held.clear()


def test_a_bars_mapping_remains_the_callers(memory: GuestMemory) -> None:
    mapping = HostMapping(2 * PAGE)
    region = memory.add_bar(GIB, PAGE, mapping, PAGE, "bar0")
    assert (region.kind, region.kind.dma, region.hva) == (RegionKind.BAR, False, mapping.address + PAGE)
    with pytest.raises(IndexError):
        memory.read(GIB, 1)
    memory.remove(region)
    mapping.view(0, 1)
    mapping.close()
    mapping.close()
    with pytest.raises(Closed):
        mapping.view(0, 1)


def test_populate_and_size(memory: GuestMemory) -> None:
    memory.add_ram(0, 4 * MIB)
    memory.populate()
    assert memory.ram_size == 4 * MIB
    assert memory.find(4 * MIB - 1) is not None
    assert memory.find(4 * MIB) is None
    assert Range(0, PAGE).last == PAGE - 1


# --- backings


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("kvmpass-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, 4 * MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with four huge pages of 2 MiB, one of them reserved by another process."""
    path = tmp_path / POOLS / "hugepages-2048kB"
    path.mkdir(parents=True)
    values = {"free": 4, "resv": 1, "nr": 6, "nr_overcommit": 0, "surplus": 0}
    for name, value in values.items():
        (path / f"{name}_hugepages").write_text(f"{value}\n")
    monkeypatch.setattr(kvmpass.memory.mapping, "ROOT", str(tmp_path))
    return path


def test_backings_and_kinds_of_regions(memory: GuestMemory, memfd: int) -> None:
    mapping = HostMapping(PAGE)
    regions = [
        memory.add_ram(0, PAGE),
        memory.add_rom(MIB, b"rom"),
        memory.add_shared(2 * MIB, memfd, PAGE),
        memory.add_shared(3 * MIB, memfd, PAGE, writable=False),
        memory.add_bar(4 * MIB, PAGE, mapping, 0, "bar"),
    ]
    assert [str(region.backing) for region in regions] == ["anonymous", "anonymous", "shared", "shared", "device"]
    assert [region.kind.value for region in regions] == ["ram", "rom", "ram", "rom", "bar"]
    assert (memory.ram_size, memory.ordinary_size) == (2 * PAGE, 2 * PAGE)
    mapping.close()


def test_a_file_is_shared_with_its_other_mappings(memory: GuestMemory, memfd: int) -> None:
    region = memory.add_shared(GIB + MIB, memfd, MIB, offset=2 * MIB)
    assert (region.hva - region.gpa) % HUGE == 0
    memory.populate()
    with mmap.mmap(memfd, 4 * MIB) as peer:
        memory.write(GIB + MIB + 5, b"from the guest")
        assert peer[2 * MIB + 5 : 2 * MIB + 19] == b"from the guest"
        peer[3 * MIB - 4 : 3 * MIB] = b"last"
    assert memory.read(GIB + 2 * MIB - 4, 4) == b"last"


def test_the_file_outlives_its_descriptor(memory: GuestMemory) -> None:
    """Of RAM a duplicate is kept, for daemons, until the region is removed; of ROM none."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    fd = os.memfd_create("kvmpass-test")
    os.truncate(fd, 3 * PAGE)
    region = memory.add_shared(0, fd, PAGE, 2 * PAGE)
    rom = memory.add_shared(PAGE, fd, PAGE, writable=False)
    os.close(fd)
    memory.write(0, b"x")
    assert (rom.file, region.file_offset, os.pread(region.file, 1, 2 * PAGE)) == (-1, 2 * PAGE, b"x")
    assert not os.get_inheritable(region.file)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    memory.remove(region)
    assert region.file == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_read_only_file_cannot_be_written_by_anybody(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(b"bios" * 1024)
    fd = os.open(tmp_path / "rom", os.O_RDONLY)
    try:
        with pytest.raises(PermissionError, match="mmap") as refused:
            memory.add_shared(0, fd, PAGE)
        assert "for reading, and for writing" in refused.value.__notes__[0]
        region = memory.add_shared(0, fd, PAGE, writable=False)
    finally:
        os.close(fd)
    memory.populate()
    assert (region.kind, region.kind.guest_writable, region.kind.dma) == (RegionKind.ROM, False, True)
    assert memory.read(0, 8) == b"biosbios"
    with pytest.raises(PermissionError, match="guest-physical 0x0 is a read-only file"):
        memory.write(0, b"x")


def test_a_sealed_memfd(memory: GuestMemory, memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    with pytest.raises(PermissionError) as refused:
        memory.add_shared(0, memfd, PAGE)
    assert refused.value.errno == errno.EPERM
    assert "F_SEAL_WRITE" in refused.value.__notes__[0]


@pytest.mark.parametrize(
    "gpa, size, offset, message",
    [
        (0, 4 * MIB + PAGE, 0, "the file has 0x400000 bytes, the region would end at 0x401000"),
        (0, PAGE, 4 * MIB, "would end at 0x401000"),
        (0, PAGE, 1 << 62, "would end at"),
        (0, PAGE, 100, "offset 0x64 and size 0x1000 must be multiples of this file's 0x1000"),
        (0, PAGE, -PAGE, "must be multiples"),
        (0, 100, 0, "whole pages"),
        (100, PAGE, 0, "whole pages"),
        (0, 0, 0, "whole pages"),
    ],
)
def test_parts_of_a_file_that_are_refused(
    memory: GuestMemory, memfd: int, gpa: int, size: int, offset: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        memory.add_shared(gpa, memfd, size, offset)
    assert len(memory) == 0


def test_descriptors_that_are_not_files(memory: GuestMemory) -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(LayoutError, match="neither a file nor a memfd"):
            memory.add_shared(0, reader, PAGE)
    finally:
        os.close(reader)
        os.close(writer)
    with pytest.raises(OSError) as refused:
        memory.add_shared(0, reader, PAGE)
    assert refused.value.errno == errno.EBADF


@pytest.mark.usefixtures("pool")
def test_too_few_huge_pages_are_refused_before_anything_is_mapped(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostMapping, "__init__", lambda *_, **__: pytest.fail("something was mapped"))
    with pytest.raises(NotEnoughMemory, match="4 huge pages of 2 MiB are needed, 3 are free") as refused:
        memory.add_ram(0, 8 * MIB, backing=Backing.HUGETLB_2M)
    assert refused.value.__notes__ == [f"reserve them: echo 7 > /{POOLS}/hugepages-2048kB/nr_hugepages"]
    with pytest.raises(NotEnoughMemory, match="no huge pages of 1 GiB") as refused:
        memory.add_ram(0, GIB, backing=Backing.HUGETLB_1G)
    assert "pdpe1gb" in refused.value.__notes__[0]


def test_overcommitted_huge_pages_count(pool: Path) -> None:
    (pool / "nr_overcommit_hugepages").write_text("3")
    (pool / "surplus_hugepages").write_text("1")
    kvmpass.memory.mapping.check_huge_pages(HUGE, 5 * HUGE)
    with pytest.raises(NotEnoughMemory, match="6 huge pages of 2 MiB are needed, 5 are free"):
        kvmpass.memory.mapping.check_huge_pages(HUGE, 6 * HUGE)


def test_huge_regions_are_made_of_huge_pages(memory: GuestMemory) -> None:
    for backing, gpa, size in (
        (Backing.HUGETLB_2M, MIB, 2 * MIB),
        (Backing.HUGETLB_2M, 0, 3 * MIB),
        (Backing.HUGETLB_1G, 0, 512 * MIB),
        (Backing.HUGETLB_1G, 2 * MIB, GIB),
    ):
        with pytest.raises(LayoutError, match=rf"whole pages of {backing.page_size >> 20} MiB"):
            memory.add_ram(gpa, size, backing=backing)
    for backing in (Backing.SHARED, Backing.DEVICE):
        with pytest.raises(LayoutError, match="see add_shared and add_bar"):
            memory.add_ram(0, PAGE, backing=backing)


def test_listeners_refuse_before_anything_is_mapped(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    memory.listen(Listener("a", log))
    fd = os.memfd_create("kvmpass-test")
    os.truncate(fd, PAGE)
    mapping = HostMapping(PAGE)
    monkeypatch.setattr(HostMapping, "__init__", lambda *_, **__: pytest.fail("something was mapped"))
    for add in (
        lambda: memory.add_ram(0, PAGE, "unwanted"),
        lambda: memory.add_rom(0, b"x", "unwanted"),
        lambda: memory.add_shared(0, fd, PAGE, name="unwanted"),
        lambda: memory.add_bar(0, PAGE, mapping, 0, "unwanted"),
    ):
        with pytest.raises(LayoutError, match="not here"):
            add()
    assert (log, len(memory)) == ([], 0)
    os.close(fd)
    mapping.close()
