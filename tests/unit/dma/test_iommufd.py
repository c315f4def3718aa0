"""iommufd as a back end: the kernel's order, whichever call fails, and an address space that is kept from going."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support.dma_stage import DISK, NIC, SOUND, Stage
from support.fake_ioas import FakeCdev
from support.fake_vfio import Refused

import kvmpass.dma.iommufd
from kvmpass.errors import AuditFailed
from kvmpass.layout import GIB, PAGE
from kvmpass.vfio.device import DependentDevice

JOINS = ["file_add", "bind", "attach"]
LEAVES = ["detach", "file_del", "device.close"]
GROUPS = {NIC: 1, SOUND: 1, DISK: 2}
ENDS = ["unmap", "unmap", "unmap_all", "destroy", "iommufd.close"]


def test_the_order_in_which_the_kernel_wants_it(ioas: Stage) -> None:
    """KVM knows the device before it is bound; memory is mapped once it is attached."""
    device = ioas.domain.attach(NIC, 1)
    assert ioas.kernel.log == ["ioas_alloc", *JOINS, "map", "map"]
    assert device.vm == "vm"  # type: ignore[attr-defined]
    ioas.kernel.log.clear()
    other = ioas.domain.attach(DISK, 2)
    assert ioas.kernel.log == JOINS
    ioas.kernel.log.clear()
    ioas.domain.detach(device)
    assert ioas.kernel.log == LEAVES
    ioas.check()
    ioas.kernel.log.clear()
    ioas.domain.detach(other)
    assert ioas.kernel.log == LEAVES + ENDS
    ioas.check()


def test_devices_are_attached_and_mapped_in_order(ioas: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is bound first: else it would be chance which refusal the user reads."""
    bound = [threading.Event() for _ in GROUPS]
    bind = FakeCdev.bind

    def backwards(device: FakeCdev, *arguments: Any) -> int:
        number = [*GROUPS].index(device.name)
        if number + 1 < len(GROUPS):
            assert bound[number + 1].wait(10)
        try:
            return bind(device, *arguments)
        finally:
            bound[number].set()

    attached = []
    attach = FakeCdev.attach

    def note(device: FakeCdev, space: int) -> None:
        attached.append(device.name)
        attach(device, space)

    monkeypatch.setattr(FakeCdev, "bind", backwards)
    monkeypatch.setattr(FakeCdev, "attach", note)
    ioas.domain.attach_all(GROUPS, {})
    assert attached == [*GROUPS]
    start = ioas.kernel.log.index("attach")
    assert ioas.kernel.log[start:] == ["attach", "map", "map", "attach", "attach"]
    assert ioas.kernel.log[:start].count("bind") == len(GROUPS)
    ioas.check()


def test_a_device_that_is_not_there(ioas: Stage) -> None:
    with pytest.raises(FileNotFoundError, match="has no VFIO device"):
        ioas.domain.attach("0000:09:00.0", 1)
    assert ioas.kernel.state() == ({}, [])
    ioas.check()


def test_a_region_that_comes_while_a_device_opens_is_mapped_once(
    ioas: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The back end holds no lock: the domain maps what is there when the translation begins."""
    real = ioas.kernel.cdev

    def slow(name: str) -> object:
        ioas.memory.add_ram(4 * GIB, PAGE, "extra")
        return real(name)

    with monkeypatch.context() as patch:
        patch.setattr(kvmpass.dma.iommufd, "Cdev", slow)
        ioas.domain.attach(NIC, 1)
    assert len(ioas.domain.ledger) == 3
    ioas.check()


def test_a_hot_reset_needs_no_groups(ioas: Stage) -> None:
    nic = ioas.domain.attach(NIC, 1)
    ioas.domain.attach(SOUND, 1)
    ioas.kernel.dependent = {NIC: [DependentDevice(NIC, None, 1), DependentDevice(SOUND, None, 2)]}
    ioas.domain.hot_reset(nic)
    assert nic.resets == [[]]  # type: ignore[attr-defined]


def test_the_back_end_gets_the_region(ioas: Stage) -> None:
    """Not addresses alone: one that maps files needs what is behind the region."""
    seen = []
    real = ioas.domain.backend.map

    def recorded(region: object) -> None:
        seen.append(region)
        real(region)  # type: ignore[arg-type]

    ioas.domain.backend.map = recorded  # type: ignore[method-assign]
    ioas.domain.attach(NIC, 1)
    assert seen == [ioas.ram, ioas.rom]


@pytest.mark.parametrize("several", [False, True])
def test_whatever_fails_at_the_end_the_domain_says_what_holds(ioas: Stage, several: bool) -> None:
    """Each call fails once, after its work."""
    if several:
        ioas.domain.attach(DISK, 2)
    device = ioas.domain.attach(NIC, 1)
    ioas.kernel.log.clear()
    ioas.domain.detach(device)
    calls = list(ioas.kernel.log)
    assert calls == LEAVES + ([] if several else ENDS)
    for number, name in enumerate(calls, start=1):
        device = ioas.domain.attach(NIC, 1)
        ioas.kernel.fail(number, after=name != "destroy")
        with pytest.raises((Refused, AuditFailed)):
            ioas.domain.detach(device)
        ioas.kernel.log.clear()
        ioas.domain.detach(device)
        assert ioas.kernel.log == [], f"{name} fails: the device has left"
        if not several:
            assert ioas.domain.ledger == []
            assert ioas.domain.active == (name == "destroy")
            ioas.domain.close()
        ioas.check()


@pytest.mark.parametrize("several", [False, True])
def test_a_device_that_others_keep_open_reaches_nothing(ioas: Stage, several: bool) -> None:
    """Here it is KVM; a process that has the descriptor too does the same."""
    if several:
        ioas.domain.attach(DISK, 2)
    device = ioas.domain.attach(NIC, 1)
    ioas.kernel.fail(2)
    with pytest.raises(Refused, match="file_del"):
        ioas.domain.detach(device)
    left = ioas.kernel.devices[NIC]
    assert left.bound and left.ioas is None, "open, and attached to nothing"
    assert (ioas.domain.active, bool(ioas.domain.ledger)) == (several, several)
    if not several:
        assert [context.spaces for context in ioas.kernel.contexts] == [{}]
    ioas.kvm.file_del(device.fd)
    ioas.check()
    ioas.domain.close()
    assert ioas.kernel.state() == ({}, [])


def test_memory_that_could_not_be_mapped_leaves_a_device_that_others_keep_open(ioas: Stage) -> None:
    """What is undone detaches it, too: otherwise its address space could not be destroyed."""
    ioas.kernel.fail(5)
    held = {}

    def never(device: FakeCdev) -> None:
        held[device.name] = device

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused, match="map"):
        patch.setattr(FakeCdev, "_release", never)
        ioas.domain.attach(NIC, 1)
    assert not ioas.domain.active
    assert [context.spaces for context in ioas.kernel.contexts] == [{}]
    held[NIC]._release()
    ioas.check()


def test_an_address_space_that_was_kept_takes_the_next_device(ioas: Stage) -> None:
    device = ioas.domain.attach(NIC, 1)
    ioas.kernel.fail(7)
    with pytest.raises(Refused, match="destroy"):
        ioas.domain.detach(device)
    ioas.kernel.log.clear()
    ioas.domain.attach(DISK, 2)
    assert ioas.kernel.log == [*JOINS, "map", "map"]
    ioas.check()


def test_what_iommufd_says_of_nothing_is_no_error(ioas: Stage) -> None:
    """It unmaps nothing by ENOENT; any other answer is one."""
    ioas.domain.attach(NIC, 1)
    ioas.kernel.mappings.clear()
    assert ioas.domain.backend.unmap(ioas.ram) == 0
    ioas.kernel.fail(1)
    with pytest.raises(Refused):
        ioas.domain.backend.unmap(ioas.ram)
    ioas.domain._ledger.clear()
