"""iommufd as a back end: the kernel's order, whichever call fails, and an address space that is kept from going."""

from __future__ import annotations

import pytest
from support.dma_stage import DISK, NIC, SOUND, Stage
from support.fake_vfio import Refused

import kvmpass.dma.iommufd
from kvmpass.errors import AuditFailed
from kvmpass.layout import GIB, PAGE
from kvmpass.vfio.device import DependentDevice

JOINS = ["file_add", "bind", "attach"]
LEAVES = ["file_del", "device.close"]
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


def test_an_address_space_that_is_still_used_goes_with_its_vm(ioas: Stage) -> None:
    """KVM keeps the device open and attached: nothing is mapped any more, and the rest is tried again."""
    device = ioas.domain.attach(NIC, 1)
    ioas.kernel.fail(1)
    with pytest.raises(Refused, match="file_del") as refused:
        ioas.domain.detach(device)
    assert any("IOMMU_DESTROY" in note for note in refused.value.__notes__)
    assert (ioas.domain.active, ioas.domain.ledger, ioas.kernel.mappings) == (True, [], {})
    with pytest.raises(OSError, match="IOMMU_DESTROY"):
        ioas.domain.close()
    ioas.kvm.file_del(device.fd)
    ioas.domain.close()
    assert ioas.kernel.state() == ({}, [])
    ioas.check()


def test_an_address_space_that_was_kept_takes_the_next_device(ioas: Stage) -> None:
    device = ioas.domain.attach(NIC, 1)
    ioas.kernel.fail(6)
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
