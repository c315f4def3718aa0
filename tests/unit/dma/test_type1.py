"""The type 1 container as a back end: the kernel's order, whichever call fails, and groups that do not leave."""

from __future__ import annotations

import errno

import pytest
from support.dma_stage import DISK, NIC, SOUND, Stage
from support.fake_vfio import Refused

from kvmpass.errors import AuditFailed
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.vfio.device import DependentDevice


def test_attach_has_the_kernels_order(type1: Stage) -> None:
    """KVM knows the group before its device is opened: some drivers ask then (vfio_device_get_kvm_safe)."""
    device = type1.domain.attach(DISK, 2)
    assert device.vm == "vm"  # type: ignore[attr-defined]
    assert type1.kernel.log == ["set_container", "set_iommu", "map", "map", "file_add", "get_device_fd"]
    type1.kernel.log.clear()
    type1.domain.attach(NIC, 1)
    assert type1.kernel.log == ["set_container", "file_add", "get_device_fd"]
    type1.kernel.log.clear()
    type1.domain.attach(SOUND, 1)
    assert (type1.kernel.log, sorted(type1.kernel.groups)) == (["get_device_fd"], [1, 2])


@pytest.mark.parametrize("group, name, code", [(2, NIC, errno.ENODEV), (3, NIC, errno.ENOENT)])
def test_a_device_that_does_not_exist(type1: Stage, group: int, name: str, code: int) -> None:
    with pytest.raises(OSError) as refused:
        type1.domain.attach(name, group)
    assert refused.value.errno == code
    assert type1.kernel.state() == ({}, [])


def test_detach_has_the_reverse_order(type1: Stage) -> None:
    nic, sound, disk = (type1.domain.attach(*what) for what in ((NIC, 1), (SOUND, 1), (DISK, 2)))
    type1.kernel.log.clear()
    type1.domain.detach(nic)
    assert type1.kernel.log == ["device.close"]
    type1.check()
    type1.kernel.log.clear()
    type1.domain.detach(sound)
    assert type1.kernel.log == ["device.close", "file_del", "unset_container", "group.close"]
    assert len(type1.domain.ledger) == 2
    type1.check()
    type1.kernel.log.clear()
    type1.calls.clear()
    type1.domain.detach(disk)
    steps = "device.close file_del unmap unmap unmap_all unset_container group.close container.close"
    assert type1.kernel.log == steps.split()
    assert sorted(type1.calls) == [("unmap", Range(0, MIB)), ("unmap", Range(GIB, PAGE))]
    type1.check()
    type1.domain.detach(disk)
    type1.domain.attach(DISK, 2)
    type1.check()


@pytest.mark.parametrize("several", [False, True])
def test_a_failed_step_of_detach_does_not_stop_the_others(type1: Stage, several: bool) -> None:
    """Each call fails once: every other one is still made, and the domain says what holds."""
    if several:
        type1.domain.attach(DISK, 2)
    device = type1.domain.attach(NIC, 1)
    type1.kernel.log.clear()
    type1.domain.detach(device)
    calls = list(type1.kernel.log)
    for number, name in enumerate(calls, start=1):
        device = type1.domain.attach(NIC, 1)
        type1.kernel.log.clear()
        type1.kernel.fail(number, after=name != "unset_container")
        with pytest.raises((Refused, AuditFailed)):
            type1.domain.detach(device)
        if name == "unset_container":  # a group that did not leave stays open and recorded, to be tried again
            assert type1.kernel.log == calls[:number], f"{name} fails"
            type1.domain.close()
            if several:
                type1.domain.attach(DISK, 2)
        else:
            assert type1.kernel.log == calls, f"{name} fails"
        type1.check()


def test_a_bus_reset_names_the_groups_of_the_dependent_devices(type1: Stage) -> None:
    nic, _, disk = (type1.domain.attach(*what) for what in ((NIC, 1), (SOUND, 1), (DISK, 2)))
    type1.kernel.dependent = {
        NIC: [DependentDevice(NIC, 1, None), DependentDevice(SOUND, 1, None)],
        DISK: [DependentDevice(DISK, 2, None)],
    }
    type1.domain.hot_reset(nic)
    assert nic.resets == [[1]]  # type: ignore[attr-defined]
    type1.domain.hot_reset(disk)
    assert disk.resets == [[2]]  # type: ignore[attr-defined]


def test_a_group_that_could_not_leave_leaves_at_the_end(type1: Stage) -> None:
    device = type1.domain.attach(NIC, 1)
    group = type1.kernel.groups[1]
    real = group.unset_container

    def refuse() -> None:
        raise Refused(errno.EBUSY, "unset_container")

    group.unset_container = refuse  # type: ignore[method-assign]
    for end in (lambda: type1.domain.detach(device), type1.domain.close):
        with pytest.raises(Refused, match="unset_container"):
            end()
        assert (list(type1.kernel.groups), type1.domain.active) == ([1], True)
    group.unset_container = real  # type: ignore[method-assign]
    type1.domain.close()
    assert type1.kernel.state() == ({}, [])
    type1.check()


@pytest.mark.parametrize("other", [(SOUND, 1), (DISK, 2)], ids=["same group", "other group"])
def test_after_a_group_could_not_leave_the_next_device_has_all_memory(type1: Stage, other: tuple[str, int]) -> None:
    """The group's mappings are gone; its container is still there."""
    device = type1.domain.attach(NIC, 1)
    type1.kernel.log.clear()
    type1.kernel.fail(6)
    with pytest.raises(Refused, match="unset_container"):
        type1.domain.detach(device)
    assert (type1.domain.active, type1.domain.ledger, type1.kernel.mappings) == (True, [], {})
    extra = type1.memory.add_ram(4 * GIB, PAGE, "extra")
    type1.domain.audit()
    type1.domain.attach(*other)
    assert len(type1.domain.ledger) == 3
    type1.domain.audit()
    assert set(type1.kernel.mappings) == {Range(0, MIB), Range(GIB, PAGE), extra.range}


def test_mappings_lost_with_the_container_are_mapped_again(type1: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of them could be undone, and yet the group left."""
    device = type1.domain.attach(NIC, 1)

    def refuse(*_: object) -> int:
        raise Refused(errno.EBUSY, "refused")

    with monkeypatch.context() as patch, pytest.raises(Refused):
        patch.setattr(type1.domain.backend, "unmap", refuse)
        patch.setattr(type1.domain.backend, "unmap_rest", refuse)
        type1.domain.detach(device)
    assert (type1.domain.active, type1.domain.ledger) == (False, [])
    type1.domain.attach(NIC, 1)
    type1.check()
