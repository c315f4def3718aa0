"""Configuration space as memory: what a guest reads there is what an exit would read."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from support.fake_bar import Listener
from support.virtio_driver import Driver

from kvmpass import pciregs
from kvmpass.kvm import Fastpath, FastRegisters
from kvmpass.layout import ECAM_BASE, ECAM_SIZE, PAGE, Range
from kvmpass.memory import GuestMemory, MemoryRegion, RegionKind
from kvmpass.pci import Ecam, PciBus
from kvmpass.pci.readable import ReadableConfig
from kvmpass.virtio.function import CAP_PCI


class Function:
    """One that changes by itself."""

    def config_read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def config_write(self, offset: int, data: bytes) -> None: ...

    def config_image(self) -> None: ...

    def set_multifunction(self, several: bool) -> None: ...

    def close(self) -> None: ...


class Assigned(Function):
    """One whose registers are for the fast path; ``self.registers`` say what it is."""

    def __init__(self, tag: int) -> None:
        self.registers = FastRegisters(
            bytearray([tag]) * PAGE, bytearray(b"\xff") * PAGE, fd=-1, offset=0, exits=Range(8, 4)
        )

    def config_image(self) -> FastRegisters:  # type: ignore[override]
        return self.registers


class Stage:
    def __init__(self, bus: PciBus) -> None:
        self.bus, self.memory, self.kvm = bus, GuestMemory(), Listener()
        self.memory.listen(self.kvm)
        self.fastpath = Fastpath()
        self.config = ReadableConfig(bus, self.memory, Range(ECAM_BASE, ECAM_SIZE), self.fastpath)

    def regions(self) -> list[tuple[int, int]]:
        """First and last devfn of each."""
        assert all(region.kind is RegionKind.REGISTERS for region in self.memory)
        found = [Range(region.gpa - ECAM_BASE, region.size) for region in self.memory]
        return [(range_.start // PAGE, range_.last // PAGE) for range_ in found]

    def read(self, address: int, size: int) -> bytes | None:
        """What the guest reads without an exit; None where it exits."""
        for region in self.memory:
            if region.range.contains(Range(ECAM_BASE + address, size)):
                return bytes(region.mapping.view(region.offset + ECAM_BASE + address - region.gpa, size))
        return None

    def check(self) -> None:
        """Every page agrees with an exit, or exits."""
        ecam = Ecam(self.bus)
        for devfn in range(256):
            shown = self.read(devfn * PAGE, PAGE)
            if shown is not None:
                assert shown == b"".join(ecam.read(devfn * PAGE + at, 4) for at in range(0, PAGE, 4)), devfn

    def close(self) -> None:
        self.config.close()
        self.config.close()
        assert len(self.memory) == 0 == len(self.kvm.slots)
        self.memory.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage(PciBus())
    yield stage
    stage.close()


def test_functions_come_and_go(stage: Stage) -> None:
    assert stage.regions() == [(0, 255)]
    stage.check()
    functions = [Function(), Function(), Function()]
    for function, slot, number in zip(functions, (1, 31, 1), (0, 0, 3), strict=True):
        stage.bus.plug(function, slot, number)
    assert stage.regions() == [(0, 7), (9, 10), (12, 247), (249, 255)]
    stage.check()
    for function in functions:
        stage.bus.unplug(function)
    assert stage.regions() == [(0, 255)]
    stage.check()


def test_what_a_guest_writes_is_shown(stage: Stage) -> None:
    driver = Driver()
    try:
        stage.bus.plug(driver.function, 3)
        assert stage.regions() == [(0, 255)], "a virtio function changes by writes only"
        stage.check()
        for offset, value in ((pciregs.COMMAND, 6), (pciregs.BAR0, 0xFFFF_FFFF), (pciregs.BAR0, driver.bar)):
            stage.bus.write(0, 3 << 3, offset, value.to_bytes(4, "little"))
            assert stage.read((3 << 15) + offset, 4) == stage.bus.read(0, 3 << 3, offset, 4)
            stage.check()
        window = driver.find(CAP_PCI)
        stage.bus.write(0, 3 << 3, window + 12, b"\4\0\0\0")
        assert stage.regions() == [(0, 23), (25, 255)], "a read of the window is one of the BAR"
        stage.bus.write(0, 3 << 3, window + 12, bytes(4))
        assert stage.regions() == [(0, 255)]
        stage.bus.unplug(driver.function)
    finally:
        driver.close()
        driver.memory.close()


def test_header_type_of_function_0_follows_its_slot(stage: Stage) -> None:
    driver = Driver()
    try:
        stage.bus.plug(driver.function, 3)
        stage.bus.plug(other := Function(), 3, 1)
        assert stage.read((3 << 15) + pciregs.HEADER_TYPE, 1) == bytes([pciregs.MULTIFUNCTION])
        stage.bus.unplug(other)
        assert stage.read((3 << 15) + pciregs.HEADER_TYPE, 1) == b"\0"
        stage.bus.unplug(driver.function)
    finally:
        driver.close()
        driver.memory.close()


def test_a_memslot_that_kvm_keeps_prevents_a_plug(stage: Stage) -> None:
    """The guest would read that the slot is empty."""
    stage.kvm.refusing = "removed"
    function = Function()
    with pytest.raises(OSError, match="KVM_SET_USER"):
        stage.bus.plug(function, 1)
    assert function not in stage.bus.functions
    stage.kvm.refusing = ""
    stage.bus.plug(function, 1)
    assert stage.regions() == [(0, 7), (9, 255)]
    stage.check()
    stage.bus.unplug(function)


def test_registers_of_a_device_are_read_on_the_fast_path(stage: Stage) -> None:
    """While the function is on the bus."""
    first, second = Assigned(1), Assigned(2)
    stage.bus.plug(first, 1)
    stage.bus.plug(second, 3, 2)
    assert stage.regions() == [(0, 7), (9, 25), (27, 255)]
    places = (ECAM_BASE + (1 << 15), ECAM_BASE + (3 << 15 | 2 << 12))
    assert [stage.fastpath.read(place, 4) for place in places] == [b"\1" * 4, b"\2" * 4]
    assert stage.fastpath.read(places[0] + 8, 4) is None
    assert stage.fastpath.counts == {"ECAM": (2, 0)}
    stage.bus.write(0, 1 << 3, 4, bytes(4))
    assert stage.fastpath.read(places[0], 4) == b"\1" * 4, "a write changes nothing"
    stage.bus.unplug(first)
    assert [stage.fastpath.read(place, 4) for place in places] == [None, b"\2" * 4]
    stage.fastpath.set(bar := ECAM_BASE + ECAM_SIZE, second.registers, "BAR")
    stage.config.close()
    assert stage.fastpath.read(places[1], 4) is None
    assert stage.fastpath.read(bar, 4) == b"\2" * 4, "it is the BAR's"
    stage.bus.unplug(second)


@pytest.mark.parametrize("number", [0, 1])
def test_nothing_is_read_of_a_function_that_is_unplugged_whatever_kvm_refuses(stage: Stage, number: int) -> None:
    """Its device will be closed, and its descriptor is then another file's."""
    other, function = Assigned(2), Assigned(1)
    stage.bus.plug(other, 1, 1 - number)
    stage.bus.plug(function, 1, number)
    at = ECAM_BASE + (1 << 15 | number << 12)
    assert stage.fastpath.read(at, 4) == b"\1" * 4
    stage.kvm.refusing = "removed"
    with pytest.raises(OSError, match="KVM_SET_USER"):
        stage.bus.unplug(function)
    assert stage.fastpath.read(at, 4) is None
    stage.kvm.refusing = ""
    stage.bus.unplug(other)


def test_without_memslots_everything_exits(stage: Stage) -> None:
    function = Function()
    stage.kvm.refusing = "added"
    stage.bus.plug(function, 1)
    assert stage.regions() == []
    stage.kvm.refusing = ""
    stage.bus.unplug(function)
    assert stage.regions() == [(0, 255)], "the next change tries it again"


def test_a_failed_constructor_leaves_nothing() -> None:
    class Refusing(Listener):
        def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
            raise OSError(errno.ENOMEM, "no")

        def region_added(self, region: MemoryRegion) -> None: ...

    memory = GuestMemory()
    memory.listen(Refusing())
    config = ReadableConfig(bus := PciBus(), memory, Range(ECAM_BASE, ECAM_SIZE), Fastpath())
    assert len(memory) == 0, "it is not needed"
    config.close()
    bus.plug(function := Function(), 1)
    bus.unplug(function)
