"""KVM's memslots follow the list of regions, over a VM with KVM's rules.

(kvm_set_memory_region, virt/kvm/kvm_main.c.)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from kvmpass.kvm import Memslots
from kvmpass.kvm.memslots import Memslot
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import GuestMemory, HostMapping, RegionKind


class Refused(OSError):
    """What an injected failure raises."""


class FakeVm:
    """Slots by number. ``fail``: the call, counted from now, that fails, before or after its work."""

    closed = False

    def __init__(self) -> None:
        self.slots: dict[int, Memslot] = {}
        self.fail, self.after = 0, False
        self.calls = 0

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        self.calls += 1
        self.fail -= 1
        if self.fail == 0 and not self.after:
            raise Refused(errno.ENOMEM, "KVM_SET_USER_MEMORY_REGION")
        self._set(Memslot(slot, gpa, size, hva, readonly))
        if self.fail == 0:
            raise Refused(errno.EINTR, "KVM_SET_USER_MEMORY_REGION")

    def _set(self, wanted: Memslot) -> None:
        here = Range(wanted.gpa, wanted.size)
        old = self.slots.get(wanted.slot)
        if not wanted.size:
            if old is None:
                raise OSError(errno.EINVAL, "there is no such slot to delete")
            del self.slots[wanted.slot]
            return
        if (wanted.gpa | wanted.size | wanted.hva) % PAGE or not 0 <= wanted.slot < 32764:
            raise OSError(errno.EINVAL, "alignment")
        if old is not None:  # a slot may move or change its flags, never its size, its memory or KVM_MEM_READONLY
            raise OSError(errno.EINVAL, "the slot is in use")
        if any(Range(slot.gpa, slot.size).overlaps(here) for slot in self.slots.values()):
            raise OSError(errno.EEXIST, "overlap")
        self.slots[wanted.slot] = wanted


class Stage:
    def __init__(self) -> None:
        self.vm = FakeVm()
        self.memory = GuestMemory()
        self.memslots = Memslots(self.vm)  # type: ignore[arg-type]
        self.memory.listen(self.memslots)

    def check(self) -> None:
        assert {slot.slot: slot for slot in self.memslots.ledger} == self.vm.slots
        assert [(s.gpa, s.size, s.hva) for s in self.memslots.ledger] == [(r.gpa, r.size, r.hva) for r in self.memory]


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.vm.fail = 0
    stage.memslots.close()
    assert stage.vm.slots == {}
    stage.memory.close()


def test_a_slot_for_each_region_by_kind(stage: Stage) -> None:
    """The guest writes RAM and BARs; a write to ROM exits (KVM_MEM_READONLY)."""
    mapping = HostMapping(2 * PAGE)
    rom = stage.memory.add_rom(GIB, b"rom")
    bar = stage.memory.add_bar(2 * GIB, PAGE, mapping, PAGE, "bar")
    ram = stage.memory.add_ram(0, MIB)
    assert stage.memslots.ledger == [
        Memslot(2, 0, MIB, ram.hva, False),
        Memslot(0, GIB, PAGE, rom.hva, True),
        Memslot(1, 2 * GIB, PAGE, mapping.address + PAGE, False),
    ]
    assert [region.kind for region in stage.memory] == [RegionKind.RAM, RegionKind.ROM, RegionKind.BAR]
    stage.check()
    stage.memory.remove(bar)
    mapping.close()


def test_slot_numbers_are_reused_lowest_first(stage: Stage) -> None:
    """KVM has 32764 of them: hot plug must not use them up."""
    regions = [stage.memory.add_ram(n * MIB, PAGE) for n in range(4)]
    stage.memory.remove(regions[2])
    stage.memory.remove(regions[1])
    stage.check()
    added = [stage.memory.add_ram(n * MIB, PAGE) for n in (10, 11, 12)]
    slots = {slot.gpa: slot.slot for slot in stage.memslots.ledger}
    assert [slots[region.gpa] for region in added] == [1, 2, 4]
    stage.check()
    for _ in range(100):
        stage.memory.remove(stage.memory.add_ram(20 * MIB, PAGE))
    assert max(stage.vm.slots) == 4


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_refused_slot_is_not_recorded(stage: Stage, after: bool) -> None:
    stage.memory.add_ram(0, PAGE)
    stage.vm.fail, stage.vm.after = 1, after
    with pytest.raises(Refused):
        stage.memory.add_ram(MIB, PAGE)
    stage.check()
    assert len(stage.vm.slots) == 1
    stage.memory.add_ram(MIB, PAGE)
    assert sorted(stage.vm.slots) == [0, 1]


def test_a_slot_that_kvm_does_not_delete_stays_recorded(stage: Stage) -> None:
    region = stage.memory.add_ram(0, PAGE)
    stage.vm.fail = 1
    with pytest.raises(Refused):
        stage.memory.remove(region)
    stage.check()
    assert len(stage.memslots.ledger) == 1


def test_close_deletes_every_slot(stage: Stage) -> None:
    for n in range(3):
        stage.memory.add_ram(n * MIB, PAGE)
    stage.vm.calls = 0
    stage.vm.fail = 2
    with pytest.raises(Refused):
        stage.memslots.close()
    assert (stage.vm.calls, len(stage.vm.slots)) == (3, 1)
    assert {slot.slot: slot for slot in stage.memslots.ledger} == stage.vm.slots, "what stayed is recorded"
    stage.memslots.close()
    assert (stage.vm.slots, stage.memslots.ledger) == ({}, [])
    stage.memslots.close()


def test_another_vm_gets_the_same_slots(stage: Stage) -> None:
    stage.memory.add_ram(0, MIB)
    stage.memory.add_rom(GIB, b"rom")
    old, new = stage.vm, FakeVm()
    stage.memslots.move(new)  # type: ignore[arg-type]
    assert new.slots == old.slots
    assert sorted(slot.readonly for slot in new.slots.values()) == [False, True]
    before = dict(old.slots)
    stage.memory.add_ram(2 * GIB, PAGE)
    assert (len(new.slots), old.slots) == (3, before), "changes go to the new one"
    stage.vm = new
    stage.check()


def test_a_vm_that_refuses_does_not_replace_the_old_one(stage: Stage) -> None:
    stage.memory.add_ram(0, MIB)
    stage.memory.add_ram(GIB, MIB)
    new = FakeVm()
    new.fail = 2
    with pytest.raises(Refused):
        stage.memslots.move(new)  # type: ignore[arg-type]
    stage.memory.add_ram(2 * GIB, PAGE)
    stage.check()


def test_every_range_of_the_list_is_accepted(stage: Stage) -> None:
    stage.memslots.region_wanted(RegionKind.BAR, Range(0xFEE0_0000, PAGE), "anything")
    assert stage.vm.calls == 0


# --- what KVM does not undo


def test_a_slot_that_kvm_may_have_is_deleted_if_it_exists(stage: Stage) -> None:
    """Creating it fails, then deleting it: EINVAL would say that there is none, anything else does not."""
    real = stage.vm.set_user_memory_region
    answers: list[int] = []

    def refuse(slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False) -> None:
        real(slot, gpa, size, hva, readonly=readonly) if size else None
        raise OSError(answers.pop(0), "KVM_SET_USER_MEMORY_REGION")

    stage.vm.set_user_memory_region = refuse  # type: ignore[method-assign]
    answers[:] = [errno.ENOMEM, errno.ENOMEM]
    with pytest.raises(OSError) as refused:
        stage.memory.add_ram(0, PAGE)
    assert refused.value.errno == errno.ENOMEM
    [region] = stage.memory
    assert stage.memslots.holds(region), "the guest may reach it: it is not unmapped"
    assert region.hva
    answers[:] = [errno.EBUSY]
    with pytest.raises(OSError, match="KVM_SET_USER"):
        stage.memory.remove(region)
    assert stage.memslots.holds(region)
    answers[:] = [errno.EINVAL]
    stage.memory.remove(region)
    assert (list(stage.memory), stage.memslots.ledger) == ([], [])
    stage.vm.slots.clear()
    stage.vm.set_user_memory_region = real  # type: ignore[method-assign]


def test_einval_keeps_the_record_of_an_acknowledged_slot(stage: Stage) -> None:
    region = stage.memory.add_ram(0, PAGE)
    slots, stage.vm.slots = stage.vm.slots, {}
    with pytest.raises(OSError) as refused:
        stage.memory.remove(region)
    assert refused.value.errno == errno.EINVAL
    assert stage.memslots.holds(region)
    stage.vm.slots = slots


def test_a_vm_that_is_closed_has_no_slots(stage: Stage) -> None:
    region = stage.memory.add_ram(0, PAGE)
    stage.vm.calls = 0
    stage.vm.closed = True
    assert not stage.memslots.holds(region)
    stage.memory.remove(region)
    assert (stage.vm.calls, stage.memslots.ledger) == (0, [])
    stage.vm.closed = False
    stage.vm.slots.clear()


def test_a_number_that_no_ioctl_accepts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object, **__: object) -> None:
        raise OverflowError

    with monkeypatch.context() as patch:
        patch.setattr(stage.vm, "set_user_memory_region", overflow)
        with pytest.raises(OverflowError):
            stage.memory.add_ram(0, PAGE)
    assert stage.memslots.ledger == []
    stage.check()


def test_a_replaced_vm_loses_its_slots(stage: Stage) -> None:
    for n in range(3):
        stage.memory.add_ram(n * MIB, PAGE)
    old, new = stage.vm, FakeVm()
    stage.memslots.move(new)  # type: ignore[arg-type]
    old.calls, old.fail = 0, 2
    with pytest.raises(Refused):
        stage.memslots.leave(old)  # type: ignore[arg-type]
    assert (old.calls, len(old.slots), len(new.slots)) == (3, 1, 3)
    stage.vm = new
    stage.check()
    old.closed = True
    stage.memslots.leave(old)  # type: ignore[arg-type]
    assert old.calls == 3


def test_a_region_added_again_is_no_longer_doubtful(stage: Stage) -> None:
    """As when another mirror keeps it: it is the same region that is added again."""
    memory = GuestMemory()
    region = memory.add_ram(0, PAGE)
    real = stage.vm.set_user_memory_region

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "KVM_SET_USER_MEMORY_REGION")

    stage.vm.set_user_memory_region = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError):
        stage.memslots.region_added(region)
    stage.vm.set_user_memory_region = real  # type: ignore[method-assign]
    stage.memslots.region_removed(region)
    assert not stage.memslots.holds(region)
    stage.memslots.region_added(region)
    slots, stage.vm.slots = stage.vm.slots, {}
    with pytest.raises(OSError):
        stage.memslots.region_removed(region)
    assert stage.memslots.holds(region)
    stage.vm.slots = slots
    stage.memslots.region_removed(region)
    memory.close()
