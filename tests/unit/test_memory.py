"""The list of regions, its bytes and its listeners."""

from collections.abc import Iterator

import pytest

from kvmpass.errors import Closed, LayoutError
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import HUGE, GuestMemory, HostMapping, MemoryRegion, RegionKind


class Listener:
    def __init__(self, name: str, log: list[str], refuse: bool = False) -> None:
        self.name, self.log, self.refuse = name, log, refuse

    def region_added(self, region: MemoryRegion) -> None:
        if self.refuse:
            raise OSError("no")
        self.log.append(f"{self.name}+{region.name}")

    def region_removed(self, region: MemoryRegion) -> None:
        self.log.append(f"{self.name}-{region.name}")


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
    assert (rom.size, rom.guest_writable, rom.dma) == (2 * PAGE, False, True)
    assert memory.read(GIB + 4999, 2) == b"x\0"


def test_overlaps_and_fractions_are_refused(memory: GuestMemory) -> None:
    memory.add_ram(MIB, MIB)
    for gpa, size in ((0, MIB + PAGE), (2 * MIB - PAGE, PAGE), (MIB + PAGE, PAGE)):
        with pytest.raises(LayoutError, match="overlaps ram"):
            memory.add_ram(gpa, size)
    for gpa, size in ((100, PAGE), (0, 100), (8 * MIB, PAGE + 1)):
        with pytest.raises(LayoutError, match="whole pages"):
            memory.add_ram(gpa, size)
    assert len(memory) == 1


def test_listeners_are_told_in_order_and_rolled_back_in_reverse(memory: GuestMemory) -> None:
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


def test_a_bars_mapping_stays_its_owners(memory: GuestMemory) -> None:
    mapping = HostMapping(2 * PAGE)
    region = memory.add_bar(GIB, PAGE, mapping, PAGE, "bar0")
    assert (region.kind, region.dma, region.hva) == (RegionKind.BAR, False, mapping.address + PAGE)
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
