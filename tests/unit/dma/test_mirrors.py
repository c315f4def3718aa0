"""KVM's memslots and the IOMMU's mappings follow the list of regions, whichever call fails on the way.

The kernel's two tables are stood in for by fakes that keep them as the kernel does; every call of either can fail,
before or after it did its work.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmpass.dma.type1
from kvmpass.dma import Domain, Type1
from kvmpass.errors import AuditFailed, LayoutError, ReservedRange
from kvmpass.kvm import Memslots
from kvmpass.layout import GIB, MIB, PAGE, Range, Reserved
from kvmpass.memory import GuestMemory, HostMapping, MemoryRegion, RegionKind

MSI = Reserved(Range(0xFEE0_0000, MIB), "msi")


class Refused(OSError):
    """What an injected failure raises."""


class Kernel:
    """Both tables; ``fail`` makes one call of those that follow fail."""

    closed = False

    def __init__(self) -> None:
        self.slots: dict[int, Range] = {}
        self.mappings: dict[Range, bool] = {}
        self.log: list[str] = []
        self.countdown = 0
        self.after = False

    def fail(self, number: int, *, after: bool = False) -> None:
        """Let the ``number``-th call from now on fail, once, without doing its work or ``after`` it."""
        self.countdown, self.after = number, after

    def step(self, what: str, work: Callable[[], Any]) -> Any:
        self.countdown -= 1
        if self.countdown != 0:
            self.log.append(what)
            return work()
        if self.after:
            work()
        raise Refused(errno.ENOMEM, what)

    # --- KVM

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        def work() -> None:
            if not size:
                if slot not in self.slots:
                    raise OSError(errno.EINVAL, "no such slot")
                del self.slots[slot]
                return
            wanted = Range(gpa, size)
            if slot in self.slots or any(other.overlaps(wanted) for other in self.slots.values()):
                raise OSError(errno.EEXIST, "overlap")
            self.slots[slot] = wanted

        self.step("slot+" if size else "slot-", work)


class FakeContainer:
    """VFIO's type 1 container over the same kernel."""

    kernel: Kernel

    def set_iommu(self) -> None: ...

    def close(self) -> None: ...

    def iova_ranges(self) -> tuple[Range, ...]:
        return (Range(0, 0xFEE0_0000), Range(0xFEF0_0000, 1 << 39))

    def map_dma(self, iova: int, hva: int, size: int, *, writable: bool) -> None:
        self.kernel.step("map", lambda: self.kernel.mappings.__setitem__(Range(iova, size), writable))

    def unmap_dma(self, iova: int, size: int) -> int:
        return self.kernel.step(
            "unmap", lambda: size if self.kernel.mappings.pop(Range(iova, size), None) in (True, False) else 0
        )

    def unmap_all(self) -> int:
        left = sum(range_.size for range_ in self.kernel.mappings)
        self.kernel.mappings.clear()
        return left


class FakeGroup:
    """A group with one device."""

    removed = False

    def __init__(self, number: int) -> None:
        self.fd = self.number = number

    def set_container(self, container: FakeContainer) -> None: ...

    def unset_container(self) -> None: ...

    def close(self) -> None: ...

    def get_device_fd(self, name: str, vf_token: object) -> FakeDevice:
        return FakeDevice(name)


class FakeDevice:
    def __init__(self, name: str) -> None:
        self.name = name

    def close(self) -> None: ...


class FakeMachine:
    """Guest memory with both mirrors, and RAM and ROM in it."""

    def __init__(self) -> None:
        self.kernel = FakeContainer.kernel = Kernel()
        self.memory = GuestMemory()
        self.memslots = Memslots(self.kernel)  # type: ignore[arg-type]
        self.memory.listen(self.memslots)
        self.domain = Domain(self.memory, Type1, None, [MSI])
        self.memory.add_ram(0, MIB, "ram0")
        self.memory.add_rom(GIB, b"rom")

    def state(self) -> tuple[Any, ...]:
        """Everything that must be as before after a refusal."""
        return (
            [str(region) for region in self.memory],
            self.memslots.ledger,
            self.domain.ledger,
            dict(self.kernel.slots),
            dict(self.kernel.mappings),
        )

    def check(self) -> None:
        """The ledgers are the kernel's tables, and both are the list."""
        self.domain.audit()
        assert sorted(Range(m.iova, m.size) for m in self.domain.ledger) == sorted(self.kernel.mappings)
        assert {slot.slot: Range(slot.gpa, slot.size) for slot in self.memslots.ledger} == self.kernel.slots
        assert sorted(region.range for region in self.memory) == sorted(self.kernel.slots.values())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    monkeypatch.setattr(kvmpass.dma.type1, "Container", FakeContainer)
    monkeypatch.setattr(kvmpass.dma.type1, "Group", FakeGroup)
    machine = FakeMachine()
    yield machine
    machine.kernel.fail(0)
    machine.domain.close()
    machine.memslots.close()
    assert (machine.kernel.slots, machine.kernel.mappings) == ({}, {})
    machine.memory.close()


@pytest.fixture
def open_mappings(monkeypatch: pytest.MonkeyPatch) -> list[HostMapping]:
    """The mappings that were made and not closed."""
    alive: list[HostMapping] = []
    made, closed = HostMapping.__init__, HostMapping.close

    def init(self: HostMapping, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        alive.append(self)

    def close(self: HostMapping) -> None:
        closed(self)
        if self in alive:
            alive.remove(self)

    monkeypatch.setattr(HostMapping, "__init__", init)
    monkeypatch.setattr(HostMapping, "close", close)
    return alive


def add_ram(memory: GuestMemory) -> MemoryRegion:
    return memory.add_ram(2 * GIB, 4 * PAGE, "extra")


def add_rom(memory: GuestMemory) -> MemoryRegion:
    return memory.add_rom(2 * GIB, b"extra")


def add_shared(memory: GuestMemory) -> MemoryRegion:
    fd = os.memfd_create("kvmpass-test")
    try:
        os.truncate(fd, PAGE)
        return memory.add_shared(2 * GIB, fd, PAGE)
    finally:
        os.close(fd)


ADDS = pytest.mark.parametrize("add", [add_ram, add_rom, add_shared])
AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
ACTIVE = pytest.mark.parametrize("active", [False, True], ids=["inactive", "active"])


@ADDS
@AFTER
@ACTIVE
def test_a_region_that_is_refused_leaves_nothing(
    machine: FakeMachine,
    open_mappings: list[HostMapping],
    add: Callable[[GuestMemory], MemoryRegion],
    after: bool,
    active: bool,
) -> None:
    if active:
        machine.domain.attach("device", 1)
    before = machine.state()
    for number, call in enumerate(["slot+", "map"] if active else ["slot+"], start=1):
        machine.kernel.fail(number, after=after)
        with pytest.raises(Refused, match=re.escape(call)):
            add(machine.memory)
        assert machine.state() == before
        assert open_mappings == []
        machine.check()
    region = add(machine.memory)
    machine.check()
    machine.memory.remove(region)
    assert machine.state() == before
    assert open_mappings == []


@ACTIVE
def test_a_region_that_cannot_be_removed_stays_whole(
    machine: FakeMachine, open_mappings: list[HostMapping], active: bool
) -> None:
    if active:
        machine.domain.attach("device", 1)
    region = add_ram(machine.memory)
    before = machine.state()
    for number, call in enumerate(["unmap", "slot-"] if active else ["slot-"], start=1):
        machine.kernel.fail(number)
        with pytest.raises(Refused, match=call):
            machine.memory.remove(region)
        assert machine.state() == before
        assert [mapping.address for mapping in open_mappings] == [region.hva]
        machine.check()
    machine.memory.remove(region)
    machine.check()
    assert open_mappings == []


def test_a_region_that_only_the_domain_holds_can_be_removed(
    machine: FakeMachine, open_mappings: list[HostMapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map failed, and so did the unmap that was to make sure of it; its memslot was deleted."""
    machine.domain.attach("device", 1)

    def refuse(*_: Any) -> int:
        raise Refused(errno.ENOMEM, "unmap")

    machine.kernel.fail(2)
    with monkeypatch.context() as patch, pytest.raises(Refused, match="map"):
        patch.setattr(FakeContainer, "unmap_dma", refuse)
        add_ram(machine.memory)
    region = next(region for region in machine.memory if region.name == "extra")
    assert (machine.memslots.holds(region), machine.domain.holds(region)) == (False, True)
    machine.memory.remove(region)
    machine.check()
    assert open_mappings == []


@AFTER
def test_a_device_that_cannot_join_leaves_nothing_mapped(machine: FakeMachine, after: bool) -> None:
    for number in (1, 2):
        machine.kernel.fail(number, after=after)
        with pytest.raises(Refused, match="map"):
            machine.domain.attach("device", 1)
        assert not machine.domain.active
        assert (machine.domain.ledger, machine.kernel.mappings) == ([], {})
        machine.check()
    machine.domain.attach("device", 1)
    assert len(machine.domain.ledger) == 2
    machine.check()


def test_memslots_are_created_first_and_deleted_last(machine: FakeMachine) -> None:
    machine.domain.attach("device", 1)
    machine.kernel.log.clear()
    machine.memory.remove(add_ram(machine.memory))
    assert machine.kernel.log == ["slot+", "map", "unmap", "slot-"]


def test_memory_that_a_listener_still_holds_stays_mapped(
    machine: FakeMachine, open_mappings: list[HostMapping], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map fails, and then deleting the slot fails too: the guest may still reach these pages."""
    machine.domain.attach("device", 1)
    real = Kernel.set_user_memory_region

    def stuck(self: Kernel, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        if not size:
            raise Refused(errno.ENOMEM, "slot-")
        real(self, slot, gpa, size, hva, readonly=readonly)

    machine.kernel.fail(2)
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "set_user_memory_region", stuck)
        with pytest.raises(Refused, match="map") as refused:
            add_ram(machine.memory)
        assert any("slot-" in note for note in refused.value.__notes__)
        region = next(region for region in machine.memory if region.name == "extra")
        assert (region.hva, len(machine.memslots.ledger)) == (open_mappings[0].address, 3)
        with pytest.raises(AuditFailed, match="missing"):
            machine.domain.audit()
        with pytest.raises(Refused, match="slot-"):
            machine.memory.remove(region)
        with pytest.raises(AuditFailed, match=r"still in use, and therefore not unmapped: .*extra"):
            machine.memory.close()
    assert open_mappings == [region.mapping]
    machine.memory.remove(region)
    assert open_mappings == []


@ACTIVE
def test_a_bad_argument_changes_nothing(machine: FakeMachine, open_mappings: list[HostMapping], active: bool) -> None:
    if active:
        machine.domain.attach("device", 1)
    before = machine.state()
    for gpa, size in ((1 << 64, PAGE), ((1 << 64) - PAGE, PAGE), (GIB, 1 << 64), (-PAGE, PAGE), (0, MIB), (1, PAGE)):
        with pytest.raises(LayoutError):
            machine.memory.add_ram(gpa, size)
        with pytest.raises(LayoutError):
            machine.memory.add_bar(gpa, size, HostMapping.__new__(HostMapping), 0, "bar")
    assert (machine.state(), open_mappings) == (before, [])


def test_a_number_that_no_ioctl_takes_changes_nothing(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the ioctl: a listener that is used alone is unchanged."""
    machine.domain.attach("device", 1)
    before = machine.state()
    region = MemoryRegion(RegionKind.RAM, Range(1 << 64, PAGE), mapping := HostMapping(PAGE), name="huge")

    def overflowing(*_: Any, **__: Any) -> None:
        raise OverflowError("int too big to convert")

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "set_user_memory_region", overflowing)
        for name in ("map_dma", "unmap_dma"):
            patch.setattr(FakeContainer, name, overflowing)
        for mirror in (machine.memslots, machine.domain):
            with pytest.raises(OverflowError):
                mirror.region_added(region)
            assert not mirror.holds(region)
    assert machine.state() == before
    mapping.close()


@ACTIVE
@ADDS
def test_reserved_ranges_are_refused_before_anything_is_touched(
    machine: FakeMachine,
    monkeypatch: pytest.MonkeyPatch,
    add: Callable[[GuestMemory], MemoryRegion],
    active: bool,
) -> None:
    if active:
        machine.domain.attach("device", 1)
    before = machine.state()
    log = list(machine.kernel.log)
    monkeypatch.setattr(HostMapping, "__init__", lambda *_, **__: pytest.fail("something was mapped"))
    monkeypatch.setitem(add.__globals__, "GIB", 0xFEE0_0000 // 2)
    with pytest.raises(ReservedRange, match="0xfee00000-0xfeefffff msi") as refused:
        add(machine.memory)
    assert "reserved_regions" in refused.value.__notes__[0]
    assert (machine.kernel.log, machine.state()) == (log, before)


def test_ranges_that_only_the_container_reports(machine: FakeMachine) -> None:
    beyond = 1 << 41
    machine.memory.remove(machine.memory.add_ram(beyond, PAGE))
    machine.domain.attach("device", 1)
    with pytest.raises(ReservedRange, match="cannot translate"):
        machine.memory.add_ram(beyond, PAGE)
    machine.check()


def test_a_bar_may_lie_in_a_range_that_devices_do_not_reach(machine: FakeMachine) -> None:
    mapping = HostMapping(PAGE)
    region = machine.memory.add_bar(0xFEE0_0000, PAGE, mapping, 0, "bar")
    machine.memory.remove(region)
    mapping.close()


def test_existing_regions_are_checked_and_unmapped_again(machine: FakeMachine) -> None:
    machine.memory.add_bar(0xFEE0_0000, PAGE, (mapping := HostMapping(PAGE)), 0, "bar")
    late = Kernel()
    late.fail(3)
    with pytest.raises(Refused):
        machine.memory.listen(Memslots(late))  # type: ignore[arg-type]
    assert late.slots == {}
    other = GuestMemory()
    other.add_ram(0xFEE0_0000, PAGE, "early")
    with pytest.raises(ReservedRange, match="early"):
        Domain(other, Type1, None, [MSI])
    other.close()
    machine.memory.remove(next(region for region in machine.memory if region.name == "bar"))
    mapping.close()


def test_a_mapping_outside_the_ledger_is_found_by_the_last_detach(machine: FakeMachine) -> None:
    device = machine.domain.attach("device", 1)
    machine.kernel.mappings[Range(5 * GIB, PAGE)] = True
    with pytest.raises(AuditFailed, match="0x1000 bytes were mapped that the ledger does not have"):
        machine.domain.detach(device)
    assert not machine.domain.active


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("step", ["unmap_dma", "unset_container"])
def test_a_group_that_the_host_removed(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, removed: bool, step: str
) -> None:
    """With the group went all mappings: that is no failure. The same refusal is one while the group is ours."""
    device = machine.domain.attach("device", 1)

    def refuse(*_: object) -> int:
        raise Refused(errno.EINVAL, step)

    with monkeypatch.context() as patch:
        patch.setattr(FakeGroup, "removed", removed)
        patch.setattr(FakeContainer if step == "unmap_dma" else FakeGroup, step, refuse)
        if removed:
            machine.domain.detach(device)
        else:
            with pytest.raises(Refused, match=step):
                machine.domain.detach(device)
    # A group that cannot leave stays recorded; its mappings are its own.
    assert machine.domain.active == (step == "unset_container" and not removed)
    assert machine.domain.ledger == []
    machine.kernel.mappings.clear()
    machine.domain.close()
    assert not machine.domain.active
    machine.domain.audit()


def test_mappings_that_stay_keep_their_memory(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither unmapped nor left: the device may still reach the memory, which is not given up before that ends."""
    device = machine.domain.attach("device", 1)

    def refuse(*_: object) -> int:
        raise Refused(errno.EBUSY, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(FakeContainer, "unmap_dma", refuse)
        patch.setattr(FakeContainer, "unmap_all", refuse)
        patch.setattr(FakeGroup, "unset_container", refuse)
        for attempt in (lambda: machine.domain.detach(device), machine.domain.close):
            with pytest.raises(Refused):
                attempt()
            assert len(machine.domain.ledger) == 2
        machine.memslots.close()
        with pytest.raises(AuditFailed, match="still in use"):
            machine.memory.close()
        assert machine.memory.read(0, 4) == bytes(4)


def test_the_process_unmaps_all_memory(machine: FakeMachine) -> None:
    def count() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    machine.memory.remove(add_shared(machine.memory))
    before = count()
    for _ in range(50):
        machine.memory.remove(add_shared(machine.memory))
    assert count() <= before + 1
