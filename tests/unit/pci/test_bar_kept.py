"""A BAR whose memslots KVM refuses or keeps, and whose addresses are in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.fake_bar import MEMORY32, GuestSpace, Region

from kvmpass.kvm import FastFile, Fastpath
from kvmpass.layout import PAGE, Range
from kvmpass.pci.bar import Bar


@pytest.fixture
def guest() -> Iterator[GuestSpace]:
    guest = GuestSpace()
    yield guest
    guest.close()


# --- what KVM does not undo


def two_areas(guest: GuestSpace) -> tuple[Bar, Region]:
    region = Region(4 * PAGE, [Range(0, PAGE), Range(2 * PAGE, PAGE)])
    return guest.bar(region, MEMORY32), region


@pytest.mark.parametrize("page", [0, 2], ids=["first", "last"])
def test_a_memslot_that_kvm_keeps_changes_nothing(guest: GuestSpace, page: int) -> None:
    """Turned off, moved, sized or closed: the BAR decodes as before, with every memslot, and it can be repeated."""
    bar, region = two_areas(guest)
    bar.decode(True)
    home, before, register = bar.address, guest.slots, bar.register(False)
    guest.kvm.refusing, guest.kvm.which = "removed", lambda address: address == home + page * PAGE
    for change in (
        lambda: bar.decode(False),
        lambda: bar.set_register(home + 64 * PAGE, False),
        lambda: bar.set_register(0xFFFF_FFFF, False),
        bar.close,
    ):
        with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
            change()
        assert (guest.slots, bar.register(False), bar.address) == (before, register, home)
        assert guest.bus.read(home + PAGE, 2) == bytes(region.data[PAGE : PAGE + 2])
        assert not region.unmapped
    guest.kvm.refusing = ""
    bar.set_register(home + 64 * PAGE, False)
    assert guest.slots == [Range(home + 64 * PAGE, PAGE), Range(home + 66 * PAGE, PAGE)]
    bar.close()
    assert (guest.slots, region.unmapped) == ([], True)
    bar.close()


def test_a_memslot_that_kvm_keeps_keeps_no_descriptor_on_the_fast_path(guest: GuestSpace) -> None:
    """The device may be closed nevertheless, and its descriptor is another file's at the guest's next access."""
    device, fastpath = os.memfd_create("device"), Fastpath()
    os.truncate(device, 4 * PAGE)
    guest.wiring = replace(guest.wiring, fastpath=fastpath)
    region = Region(4 * PAGE, [Range(0, PAGE)])
    bar = Bar("bar0", region, MEMORY32, guest.wiring, file=FastFile(device, 0, 4 * PAGE))
    at = bar.address + PAGE
    bar.decode(True)
    assert fastpath.read(at, 4) == bytes(4)
    guest.kvm.refusing = "removed"
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
        bar.close()
    os.close(device)
    assert fastpath.read(at, 4) is None and not fastpath.write(at, b"lost")
    assert guest.bus.read(at, 2) == bytes(region.data[PAGE : PAGE + 2])
    guest.kvm.refusing = ""
    bar.close()
    assert (guest.slots, region.unmapped) == ([], True)


def test_one_refused_area_exits_and_the_other_is_mapped(guest: GuestSpace) -> None:
    bar, region = two_areas(guest)
    guest.kvm.refusing, guest.kvm.which = "added", lambda address: address == bar.address
    bar.decode(True)
    assert guest.slots == [Range(bar.address + 2 * PAGE, PAGE)]
    assert guest.bus.read(bar.address, 2) == bytes(region.data[:2])
    guest.kvm.refusing = ""
    bar.set_register(bar.address, False)
    assert guest.slots == [Range(bar.address, PAGE), Range(bar.address + 2 * PAGE, PAGE)]
    bar.decode(False)
    assert guest.slots == []


def test_a_memslot_that_kvm_may_have_is_deleted_like_any_other(guest: GuestSpace) -> None:
    """It refused to make it and then to delete it: until that works the pages stay mapped."""
    bar, region = two_areas(guest)
    real = guest.kvm.region_removed
    guest.kvm.refusing, guest.kvm.which = "doubtful", lambda address: address == bar.address
    bar.decode(True)
    assert Range(bar.address + 2 * PAGE, PAGE) in guest.slots
    guest.kvm.refusing = "removed"
    if Range(bar.address, PAGE) in guest.slots:
        with pytest.raises(OSError):
            bar.close()
        assert not region.unmapped
    guest.kvm.refusing = ""
    guest.kvm.region_removed = real  # type: ignore[method-assign]
    bar.close()
    assert (guest.slots, region.unmapped) == ([], True)


def test_a_page_in_use_makes_the_whole_bar_wait(guest: GuestSpace) -> None:
    """A region of memory in the second half of the place: nothing of the BAR is decoded, not even its first page."""
    bar, _ = two_areas(guest)
    other = guest.memory.add_ram(bar.address + 2 * PAGE, PAGE, "other")
    bar.decode(True)
    assert (guest.slots, guest.bus._ranges) == ([], [])
    guest.memory.remove(other)
    guest.space.released()
    assert len(guest.slots) == 2


def test_addresses_are_retried_only_once_they_are_free(guest: GuestSpace) -> None:
    first, second = (guest.bar(Region(PAGE, [Range(0, PAGE)], index), MEMORY32) for index in (0, 1))
    home = first.address
    first.decode(True)
    second.set_register(home, False)
    second.decode(True)
    guest.kvm.refusing = "removed"
    with pytest.raises(OSError):
        first.decode(False)
    assert [r.name for r in guest.memory] == ["bar0"]
    guest.kvm.refusing = ""
    first.decode(False)
    assert [r.name for r in guest.memory] == ["bar1"]
