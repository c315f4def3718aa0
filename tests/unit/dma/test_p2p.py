"""Peer-to-peer: the BARs of a domain's devices are mapped for as long as they are in guest memory, and no longer."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from support.dma_stage import BAR_AT, DISK, MEMBERS, NIC, SOUND, Stage
from support.fake_ioas import FakeIoas
from support.fake_vfio import FakeBar, FakeVfio, Refused

import kvmpass.dma.iommufd
import kvmpass.dma.type1
from kvmpass.dma import DmaMapping
from kvmpass.errors import AuditFailed, DeviceInUse, HostNotReady, ReservedRange
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import HostMapping
from kvmpass.vfio.device import DependentDevice


@pytest.fixture(params=["type1", "ioas"])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    kernel: FakeVfio | FakeIoas
    if request.param == "type1":
        kernel = FakeVfio(MEMBERS)
        monkeypatch.setattr(kvmpass.dma.type1, "Container", kernel.container)
        monkeypatch.setattr(kvmpass.dma.type1, "Group", kernel.group)
    else:
        kernel = FakeIoas(MEMBERS)
        monkeypatch.setattr(kvmpass.dma.iommufd, "Iommufd", kernel.iommufd)
        monkeypatch.setattr(kvmpass.dma.iommufd, "Cdev", kernel.cdev)
    stage = Stage(kernel, p2p=True)
    yield stage
    for region in stage.memory:
        if isinstance(region.mapping, FakeBar):
            stage.memory.remove(region)
    stage.close()


def test_a_bar_is_mapped_while_it_is_in_guest_memory(stage: Stage) -> None:
    """By one call; its place in the address space is the guest's; the ledger knows whose it is."""
    stage.domain.attach(DISK, 2)
    nic = stage.domain.attach(NIC, 1)
    stage.calls.clear()
    region = stage.bar(nic, size=2 * PAGE, area_at=4 * PAGE)
    assert stage.calls == [("map", Range(BAR_AT, 2 * PAGE))]
    assert DmaMapping(BAR_AT, 2 * PAGE, region.hva, True, NIC, 2) in stage.domain.ledger
    assert stage.kernel.peers(nic) == [region.range]
    stage.check()
    stage.memory.remove(region)
    assert stage.calls[1:] == [("unmap", Range(BAR_AT, 2 * PAGE))]
    assert stage.kernel.peers(nic) == []
    stage.check()
    stage.memory.remove(stage.bar(nic, BAR_AT + MIB))
    stage.check()


def test_without_peer_to_peer_no_bar_is_mapped(stage: Stage) -> None:
    stage.domain.p2p = False
    nic = stage.domain.attach(NIC, 1)
    stage.kernel.log.clear()
    stage.bar(nic)
    assert stage.kernel.log == []
    stage.check()


def test_no_bar_of_a_device_outside_the_domain(stage: Stage) -> None:
    """Nor memory of a function that is no device of the host's."""
    nic, disk = stage.domain.attach(NIC, 1), stage.domain.attach(DISK, 2)
    stage.domain.detach(nic)
    stage.kernel.log.clear()
    stage.bar(nic)
    other = HostMapping(PAGE)
    region = stage.memory.add_bar(BAR_AT + MIB, PAGE, other, 0, "bar0")
    assert stage.kernel.log == []
    stage.check()
    stage.memory.remove(region)
    other.close()
    stage.bar(disk, BAR_AT + 2 * MIB)
    assert stage.kernel.peers(disk)
    stage.check()


def test_mappings_that_ended_with_the_address_space_are_made_again(stage: Stage) -> None:
    """Whichever device comes next; all of the memory is looked at again for its ranges."""
    nic = stage.domain.attach(NIC, 1)
    stage.bar(nic)
    stage.domain.unmap_all()
    with pytest.raises(AuditFailed, match="missing 0xe0000000"):
        stage.domain._mapped = True
        stage.domain.audit()
    stage.domain.map_all()
    stage.check()
    stage.kernel.ranges = (Range(0, 2 * GIB),)
    with pytest.raises(ReservedRange, match="bar2 0xe0000000-0xe0000fff"):
        stage.domain.attach(DISK, 2)
    stage.check()


def test_a_device_that_does_not_decode(stage: Stage) -> None:
    """The kernel refuses it: the guest's accesses exit then, and nothing is left."""
    nic = stage.domain.attach(NIC, 1)
    nic.memory = False  # type: ignore[attr-defined]
    with pytest.raises(OSError) as refused:
        stage.bar(nic)
    assert refused.value.errno == (errno.EFAULT if isinstance(stage.kernel, FakeVfio) else errno.ENODEV)
    assert len(list(stage.memory)) == 2
    stage.check()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_call_that_fails_leaves_nothing(stage: Stage, after: bool) -> None:
    nic = stage.domain.attach(NIC, 1)
    calls = 1 if isinstance(stage.kernel, FakeVfio) else 2
    for number in range(1, calls + 1):
        stage.kernel.fail(number, after=after)
        with pytest.raises(Refused):
            stage.bar(nic)
        assert stage.kernel.peers(nic) == []
        stage.check()
    stage.bar(nic)
    stage.check()


# --- a device whose BAR cannot be unmapped


@pytest.mark.parametrize("several", [False, True])
def test_it_is_not_given_back(stage: Stage, several: bool) -> None:
    """It stays open and attached, however often that is tried; when its BAR is unmapped at last, it goes."""
    if several:
        stage.domain.attach(DISK, 2)
    nic = stage.domain.attach(NIC, 1)
    region = stage.bar(nic)

    def refuse(_: object) -> int:
        raise Refused(errno.EBUSY, "unmap")

    for end in (lambda: stage.domain.detach(nic), stage.domain.close):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceInUse, match=f"{NIC} stays open") as failed:
            patch.setattr(stage.domain.backend.inner, "unmap", refuse)
            end()
        assert "end this process" in failed.value.__notes__[0]
        assert stage.kernel.peers(nic) == [region.range]
        assert (stage.domain.active, stage.domain.holds(region)) == (True, True)
        assert nic in stage.domain._devices
    stage.domain.detach(nic)
    assert not stage.domain.holds(region)
    assert region not in list(stage.memory)
    stage.check()


def test_a_bus_is_reset_with_its_bars_unmapped_only(stage: Stage) -> None:
    """The names are those of all devices that it resets; the made-up kernel refuses a reset with a BAR mapped."""
    nic, sound = stage.domain.attach(NIC, 1), stage.domain.attach(SOUND, 1)
    group = 1 if isinstance(stage.kernel, FakeVfio) else None
    stage.kernel.dependent = {NIC: [DependentDevice(name, group, None) for name in (NIC, SOUND)]}
    assert [other.name for other in stage.domain.dependent(nic)] == [NIC, SOUND]
    region = stage.bar(sound)
    stage.memory.remove(region)
    stage.domain.hot_reset(nic)
    assert len(nic.resets) == 1  # type: ignore[attr-defined]


# --- a kernel that cannot


def test_a_kernel_that_maps_no_bars_refuses_the_device(stage: Stage) -> None:
    """Before it is attached; without peer-to-peer it is not asked."""
    stage.kernel.maps_bars = False
    with pytest.raises(HostNotReady, match="peer-to-peer"):
        stage.domain.attach(NIC, 1)
    assert "map" not in stage.kernel.log
    assert stage.kernel.state() == ({}, [])
    stage.check()
    stage.domain.p2p = False
    stage.domain.attach(NIC, 1)
    stage.check()
