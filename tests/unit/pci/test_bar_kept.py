"""A BAR whose memslots KVM refuses or keeps, and whose place somebody has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fake_bar import MEMORY32, Plant, Region

from kvmpass.layout import PAGE, Range
from kvmpass.pci.bar import Bar


@pytest.fixture
def plant() -> Iterator[Plant]:
    plant = Plant()
    yield plant
    plant.close()


# --- what KVM does not undo


def two_areas(plant: Plant) -> tuple[Bar, Region]:
    region = Region(4 * PAGE, [Range(0, PAGE), Range(2 * PAGE, PAGE)])
    return plant.bar(region, MEMORY32), region


@pytest.mark.parametrize("page", [0, 2], ids=["first", "last"])
def test_a_memslot_that_kvm_keeps_leaves_all_as_it_was(plant: Plant, page: int) -> None:
    """Turned off, moved, sized or closed: the BAR decodes as before, with every memslot, and can be asked again."""
    bar, region = two_areas(plant)
    bar.decode(True)
    home, before, register = bar.address, plant.slots, bar.register(False)
    plant.kvm.refusing, plant.kvm.which = "removed", lambda address: address == home + page * PAGE
    for change in (
        lambda: bar.decode(False),
        lambda: bar.set_register(home + 64 * PAGE, False),
        lambda: bar.set_register(0xFFFF_FFFF, False),
        bar.close,
    ):
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
            change()
        assert (plant.slots, bar.register(False), bar.address) == (before, register, home)
        assert plant.bus.read(home + PAGE, 2) == bytes(region.data[PAGE : PAGE + 2])
        assert not region.unmapped
    plant.kvm.refusing = ""
    bar.set_register(home + 64 * PAGE, False)
    assert plant.slots == [Range(home + 64 * PAGE, PAGE), Range(home + 66 * PAGE, PAGE)]
    bar.close()
    assert (plant.slots, region.unmapped) == ([], True)
    bar.close()


def test_one_area_that_kvm_does_not_take_traps_and_the_other_does_not(plant: Plant) -> None:
    bar, region = two_areas(plant)
    plant.kvm.refusing, plant.kvm.which = "added", lambda address: address == bar.address
    bar.decode(True)
    assert plant.slots == [Range(bar.address + 2 * PAGE, PAGE)]
    assert plant.bus.read(bar.address, 2) == bytes(region.data[:2])
    plant.kvm.refusing = ""
    bar.set_register(bar.address, False)
    assert plant.slots == [Range(bar.address, PAGE), Range(bar.address + 2 * PAGE, PAGE)]
    bar.decode(False)
    assert plant.slots == []


def test_a_memslot_that_kvm_may_have_made_is_deleted_like_any_other(plant: Plant) -> None:
    """It refused to make it and then to delete it: until that works the pages stay mapped."""
    bar, region = two_areas(plant)
    real = plant.kvm.region_removed
    plant.kvm.refusing, plant.kvm.which = "doubtful", lambda address: address == bar.address
    bar.decode(True)
    assert Range(bar.address + 2 * PAGE, PAGE) in plant.slots
    plant.kvm.refusing = "removed"
    if Range(bar.address, PAGE) in plant.slots:
        with pytest.raises(OSError):
            bar.close()
        assert not region.unmapped
    plant.kvm.refusing = ""
    plant.kvm.region_removed = real  # type: ignore[method-assign]
    bar.close()
    assert (plant.slots, region.unmapped) == ([], True)


def test_where_somebody_else_has_a_page_all_of_it_waits(plant: Plant) -> None:
    """A region of memory in the second half of the place: nothing of the BAR is decoded, not even its first page."""
    bar, _ = two_areas(plant)
    other = plant.memory.add_ram(bar.address + 2 * PAGE, PAGE, "other")
    bar.decode(True)
    assert (plant.slots, plant.bus._ranges) == ([], [])
    plant.memory.remove(other)
    plant.space.released()
    assert len(plant.slots) == 2


def test_others_get_a_place_only_once_it_is_free(plant: Plant) -> None:
    first, second = (plant.bar(Region(PAGE, [Range(0, PAGE)], index), MEMORY32) for index in (0, 1))
    home = first.address
    first.decode(True)
    second.set_register(home, False)
    second.decode(True)
    plant.kvm.refusing = "removed"
    with pytest.raises(OSError):
        first.decode(False)
    assert [r.name for r in plant.memory] == ["bar0"]
    plant.kvm.refusing = ""
    first.decode(False)
    assert [r.name for r in plant.memory] == ["bar1"]
