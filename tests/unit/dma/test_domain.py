"""The VM's DMA domain over a made-up VFIO: what is open, mapped and registered, whichever call fails on the way."""

from __future__ import annotations

import errno
import itertools
import uuid
from collections.abc import Iterator

import pytest
from support.fake_vfio import FakeKvmVfio, FakeVfio, Refused

import kvmpass.dma.domain
from kvmpass.dma.domain import DmaCall, DmaMapping, Domain
from kvmpass.errors import AuditFailed, DeviceInUse, NotAssignable, ReservedRange
from kvmpass.layout import GIB, MIB, PAGE, Range, Reserved
from kvmpass.memory import GuestMemory, HostMapping
from kvmpass.vfio.device import DependentDevice

NIC, SOUND, DISK = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
MSI = Reserved(Range(0xFEE0_0000, MIB), "msi")


class Stage:
    """RAM and ROM, a domain, two groups: one with two devices, one with one."""

    def __init__(self) -> None:
        self.kernel = FakeVfio({1: (NIC, SOUND), 2: (DISK,)})
        self.kvm = FakeKvmVfio(self.kernel, "vm")
        self.memory = GuestMemory()
        self.rom = self.memory.add_rom(GIB, b"rom", "rom")
        self.ram = self.memory.add_ram(0, MIB, "ram")
        self.domain = Domain(self.memory, self.kvm, [MSI])

    def check(self) -> None:
        """What the kernel has is what the domain says, and what the memory wants."""
        self.domain.audit()
        ledger = {Range(m.iova, m.size): (m.hva, m.writable) for m in self.domain.ledger}
        assert ledger == self.kernel.mappings
        assert sorted(self.kernel.groups) == self.domain.groups
        assert self.kvm.files == {group.fd for group in self.kernel.groups.values()}
        assert self.domain.active == bool(self.domain.groups) == bool(self.kernel.containers)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage()
    monkeypatch.setattr(kvmpass.dma.domain, "Container", stage.kernel.container)
    monkeypatch.setattr(kvmpass.dma.domain, "Group", stage.kernel.group)
    yield stage
    stage.kernel.fail(0)
    stage.domain.close()
    assert (stage.kernel.state(), stage.kvm.files) == (({}, []), set())
    stage.memory.close()


# --- attach


def test_the_first_device_maps_everything_and_others_nothing(stage: Stage) -> None:
    assert (stage.domain.active, stage.domain.groups, stage.domain.ledger) == (False, [], [])
    disk = stage.domain.attach(DISK, 2)
    assert disk.name == DISK
    ram, rom = DmaMapping(0, MIB, stage.ram.hva, True), DmaMapping(GIB, PAGE, stage.rom.hva, False)
    assert stage.domain.ledger == [ram, rom]
    assert list(stage.domain.calls) == [DmaCall("map", Range(0, MIB)), DmaCall("map", Range(GIB, PAGE))]
    stage.check()
    stage.domain.attach(NIC, 1)
    stage.domain.attach(SOUND, 1)
    assert len(stage.domain.calls) == 2
    assert stage.domain.groups == [1, 2]
    stage.check()


def test_the_order_in_which_the_kernel_wants_it(stage: Stage) -> None:
    """KVM knows the group before its device is opened: some drivers ask then (vfio_device_get_kvm_safe)."""
    device = stage.domain.attach(DISK, 2)
    assert device.vm == "vm"  # type: ignore[attr-defined]
    assert stage.kernel.log == ["set_container", "set_iommu", "map", "map", "file_add", "get_device_fd"]
    stage.kernel.log.clear()
    stage.domain.attach(NIC, 1)
    assert stage.kernel.log == ["set_container", "file_add", "get_device_fd"]


def test_a_token_reaches_vfio(stage: Stage) -> None:
    token = uuid.uuid4()
    assert stage.domain.attach(DISK, 2, token).vf_token == token  # type: ignore[attr-defined]


def test_a_device_that_is_in_already(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    before = stage.kernel.state()
    with pytest.raises(DeviceInUse, match=f"{NIC} is in this domain already"):
        stage.domain.attach(NIC, 1)
    assert stage.kernel.state() == before
    stage.check()
    assert stage.domain.attach(SOUND, 1).name == SOUND


def test_a_domain_without_kvm(stage: Stage) -> None:
    domain = Domain(stage.memory)
    device = domain.attach(DISK, 2)
    assert "file_add" not in stage.kernel.log
    domain.detach(device)
    assert "file_del" not in stage.kernel.log
    assert not domain.active


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("present", [(), ((SOUND, 1),), ((DISK, 2),)], ids=["first", "same group", "other group"])
def test_whatever_fails_while_a_device_joins_nothing_is_left(
    stage: Stage, present: tuple[tuple[str, int], ...], after: bool
) -> None:
    """A call that failed after its work: a signal's exception between the system call and its caller."""
    for name, group in present:
        stage.domain.attach(name, group)
    before = stage.kernel.state()
    failed = []
    for number in itertools.count(1):
        stage.kernel.log.clear()
        stage.kernel.fail(number, after=after)
        try:
            stage.domain.attach(NIC, 1)
        except Refused as error:
            failed.append(error.strerror)
            stage.kernel.fail(0)
            assert stage.kernel.state() == before, error.strerror
            stage.check()
        else:
            break
    assert stage.kernel.log == failed
    stage.check()


@pytest.mark.parametrize("group, name, code", [(2, NIC, errno.ENODEV), (3, NIC, errno.ENOENT)])
def test_a_device_that_is_not_there(stage: Stage, group: int, name: str, code: int) -> None:
    with pytest.raises(OSError) as refused:
        stage.domain.attach(name, group)
    assert refused.value.errno == code
    assert stage.kernel.state() == ({}, [])


@pytest.mark.parametrize("present", [False, True])
def test_memory_that_the_host_cannot_translate_refuses_the_device(stage: Stage, present: bool) -> None:
    """Ranges can shrink with each group that joins: they are looked at again, for all of the memory."""
    if present:
        stage.domain.attach(DISK, 2)
    before = stage.kernel.state()
    stage.kernel.ranges = (Range(0, GIB),)
    with pytest.raises(ReservedRange, match="rom 0x40000000-0x40000fff falls into addresses that the IOMMU"):
        stage.domain.attach(NIC, 1)
    assert stage.kernel.state() == before
    stage.kernel.ranges = (Range(0, MIB), Range(GIB, PAGE))
    stage.domain.attach(NIC, 1)
    stage.check()


def test_an_iommu_that_lists_no_ranges_is_not_asked(stage: Stage) -> None:
    stage.kernel.ranges = ()
    stage.domain.attach(NIC, 1)
    stage.check()


# --- detach


def test_the_end_goes_the_other_way_round(stage: Stage) -> None:
    nic, sound, disk = (stage.domain.attach(*what) for what in ((NIC, 1), (SOUND, 1), (DISK, 2)))
    stage.kernel.log.clear()
    stage.domain.detach(nic)
    assert stage.kernel.log == ["device.close"]
    stage.check()
    stage.kernel.log.clear()
    stage.domain.detach(sound)
    assert stage.kernel.log == ["device.close", "file_del", "unset_container", "group.close"]
    assert len(stage.domain.ledger) == 2
    stage.check()
    stage.kernel.log.clear()
    stage.domain.calls.clear()
    stage.domain.detach(disk)
    steps = "device.close file_del unmap unmap unmap_all unset_container group.close container.close"
    assert stage.kernel.log == steps.split()
    assert sorted(call.range for call in stage.domain.calls) == [Range(0, MIB), Range(GIB, PAGE)]
    assert {call.operation for call in stage.domain.calls} == {"unmap"}
    stage.check()
    stage.domain.detach(disk)
    stage.domain.attach(DISK, 2)
    stage.check()


@pytest.mark.parametrize("several", [False, True])
def test_whatever_fails_at_the_end_the_rest_is_done(stage: Stage, several: bool) -> None:
    """Each call fails once: every other one is still made, and the domain says what holds."""
    if several:
        stage.domain.attach(DISK, 2)
    device = stage.domain.attach(NIC, 1)
    stage.kernel.log.clear()
    stage.domain.detach(device)
    calls = list(stage.kernel.log)
    for number, name in enumerate(calls, start=1):
        device = stage.domain.attach(NIC, 1)
        stage.kernel.log.clear()
        stage.kernel.fail(number, after=name != "unset_container")
        with pytest.raises((Refused, AuditFailed)):
            stage.domain.detach(device)
        if name == "unset_container":  # a group that did not leave stays open and recorded, to be tried again
            assert stage.kernel.log == calls[:number], f"{name} fails"
            stage.domain.close()
            if several:
                stage.domain.attach(DISK, 2)
        else:
            assert stage.kernel.log == calls, f"{name} fails"
        stage.check()


def test_close_is_for_all_and_idempotent(stage: Stage) -> None:
    for what in ((NIC, 1), (SOUND, 1), (DISK, 2)):
        stage.domain.attach(*what)
    stage.domain.close()
    assert stage.kernel.state() == ({}, [])
    stage.check()
    stage.domain.close()


def test_a_device_that_does_not_close_does_not_keep_the_others(stage: Stage) -> None:
    for what in ((NIC, 1), (DISK, 2)):
        stage.domain.attach(*what)
    stage.kernel.fail(1, after=True)
    with pytest.raises(Refused, match=r"device\.close"):
        stage.domain.close()
    assert stage.kernel.state() == ({}, [])


@pytest.mark.parametrize("size", [0, 2 * PAGE])
def test_what_the_kernel_had_mapped_otherwise_is_an_error(
    stage: Stage, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.domain.attach(NIC, 1)
    region = stage.memory.add_ram(4 * GIB, PAGE, "extra")
    stage.kernel.mappings.pop(Range(4 * GIB, PAGE))
    message = f"extra: {size:#x} bytes were mapped at 0x100000000, the ledger has 0x1000"
    with monkeypatch.context() as patch, pytest.raises(AuditFailed, match=message):
        patch.setattr(stage.kernel.containers[0], "unmap_dma", lambda *_: size)
        stage.domain.unmap_region(region)
    assert stage.domain.calls[-1] == DmaCall("unmap", Range(4 * GIB, PAGE))


# --- memory


def test_regions_come_and_go_with_one_call_each(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    stage.kernel.log.clear()
    stage.domain.calls.clear()
    extra = stage.memory.add_rom(4 * GIB, b"extra")
    stage.check()
    assert stage.domain.ledger[-1] == DmaMapping(4 * GIB, PAGE, extra.hva, False)
    stage.memory.remove(extra)
    stage.check()
    assert stage.kernel.log == ["map", "unmap"]
    here = Range(4 * GIB, PAGE)
    assert list(stage.domain.calls) == [DmaCall("map", here), DmaCall("unmap", here)]


def test_all_regions_are_mapped_or_none(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    for region in (stage.ram, stage.rom):
        stage.domain.unmap_region(region)
    stage.kernel.fail(2)
    with pytest.raises(Refused):
        stage.domain.map_all()
    assert (stage.kernel.mappings, stage.domain.ledger) == ({}, [])
    stage.domain.map_all()
    stage.check()


def test_a_bar_is_nothing_for_devices(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    before, mapping = dict(stage.kernel.mappings), HostMapping(PAGE)
    region = stage.memory.add_bar(0xFEE0_0000, PAGE, mapping, 0, "bar")
    assert stage.kernel.mappings == before
    stage.domain.audit()
    stage.memory.remove(region)
    mapping.close()


def test_only_the_latest_calls_are_kept(stage: Stage) -> None:
    """A guest can cause these: they must not grow the host's memory."""
    assert stage.domain.calls.maxlen == 65536


@pytest.mark.parametrize("change", ["missing", "unexpected", "moved", "protection"])
def test_an_audit_names_every_difference(stage: Stage, change: str) -> None:
    stage.domain.attach(NIC, 1)
    key, other = stage.ram, stage.memory.add_ram(4 * GIB, PAGE)
    mapping = stage.domain._ledger[key]
    extra = "missing 0x100000000-0x100000fff rw; " if change == "missing" else ""
    match change:
        case "missing":
            del stage.domain._ledger[key], stage.domain._ledger[other]
            expected = f"missing 0x0-0xfffff rw; {extra}"[:-2]
        case "unexpected":
            stage.memory._regions = (stage.rom,)
            expected = "unexpected 0x0-0xfffff rw; unexpected 0x100000000-0x100000fff rw"
        case "moved":
            stage.domain._ledger[key] = DmaMapping(8 * GIB, MIB, mapping.hva, True)
            expected = "missing 0x0-0xfffff rw; unexpected 0x200000000-0x2000fffff rw"
        case "protection":
            stage.domain._ledger[key] = DmaMapping(0, MIB, mapping.hva, False)
            expected = "missing 0x0-0xfffff rw; unexpected 0x0-0xfffff ro"
    with pytest.raises(AuditFailed) as failed:
        stage.domain.audit()
    assert str(failed.value) == f"DMA mappings differ from guest memory: {expected}"
    stage.memory._regions = (stage.rom, stage.ram, other)
    stage.domain._ledger = {
        region: DmaMapping(region.gpa, region.size, region.hva, region.kind.dma_writable) for region in stage.memory
    }


# --- other VMs, resets


def test_another_vm_takes_the_groups_over(stage: Stage) -> None:
    """The old one lets go first: the other way round the group would belong to nobody (kvm_vfio_file_del)."""
    for what in ((NIC, 1), (DISK, 2)):
        stage.domain.attach(*what)
    successor = FakeKvmVfio(stage.kernel, "successor")
    stage.domain.use_kvm(successor)
    assert {group.kvm for group in stage.kernel.groups.values()} == {"successor"}
    assert (stage.kvm.files, successor.files) == (set(), {101, 102})
    stage.kvm = successor
    stage.check()
    stage.domain.close()
    assert successor.files == set()


def test_a_first_vm_for_a_domain_that_had_none(stage: Stage) -> None:
    domain = Domain(stage.memory)
    domain.attach(DISK, 2)
    domain.use_kvm(stage.kvm)
    assert stage.kernel.groups[2].kvm == "vm"
    domain.close()


def test_a_reset_of_the_bus_names_the_groups_that_it_hits(stage: Stage) -> None:
    nic, _, disk = (stage.domain.attach(*what) for what in ((NIC, 1), (SOUND, 1), (DISK, 2)))
    stage.kernel.dependent = {
        NIC: [DependentDevice(NIC, 1, None), DependentDevice(SOUND, 1, None)],
        DISK: [DependentDevice(DISK, 2, None)],
    }
    stage.domain.hot_reset(nic)
    assert nic.resets == [[1]]  # type: ignore[attr-defined]
    stage.domain.hot_reset(disk)
    assert disk.resets == [[2]]  # type: ignore[attr-defined]


def test_a_reset_that_would_hit_others_is_refused(stage: Stage) -> None:
    nic = stage.domain.attach(NIC, 1)
    names = (NIC, SOUND, "0000:01:00.2")
    stage.kernel.dependent = {NIC: [DependentDevice(name, 1, None) for name in names]}
    with pytest.raises(NotAssignable, match=rf"{NIC}'s bus would reset {SOUND}, 0000:01:00.2 too"):
        stage.domain.hot_reset(nic)
    assert nic.resets == []  # type: ignore[attr-defined]


def test_nobody_runs_over_the_devices_for_a_while(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    stage.domain.use_kvm(None)
    assert (stage.kvm.files, stage.kernel.groups[1].kvm) == (set(), None)
    stage.domain.attach(DISK, 2)
    stage.domain.use_kvm(stage.kvm)
    assert {group.kvm for group in stage.kernel.groups.values()} == {"vm"}
    stage.check()


# --- what the kernel does not undo


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_region_that_may_still_be_mapped_stays_recorded(stage: Stage, after: bool) -> None:
    """The map fails, and the unmap that is to make sure of it fails too."""
    stage.domain.attach(NIC, 1)
    container = stage.kernel.containers[0]
    real = container.unmap_dma

    def refuse(*_: int) -> int:
        raise Refused(errno.ENOMEM, "unmap")

    container.unmap_dma = refuse  # type: ignore[method-assign]
    stage.kernel.fail(1, after=after)
    with pytest.raises(Refused, match="map") as refused:
        stage.memory.add_ram(4 * GIB, PAGE, "extra")
    assert any("unmap" in note for note in refused.value.__notes__)
    [*_, region] = stage.memory
    assert (region.name, stage.domain.holds(region)) == ("extra", True)
    assert region.hva, "devices may reach it"
    container.unmap_dma = real  # type: ignore[method-assign]
    if not after:
        container.mappings[Range(4 * GIB, PAGE)] = (region.hva, True)
    stage.memory.remove(region)
    assert not stage.domain.holds(region)
    stage.check()


def test_a_region_whose_unmap_fails_is_held(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    region = stage.memory.add_ram(4 * GIB, PAGE, "extra")
    stage.kernel.fail(1)
    with pytest.raises(Refused):
        stage.memory.remove(region)
    assert stage.domain.holds(region)
    stage.check()
    stage.memory.remove(region)
    assert not stage.domain.holds(region)


def test_a_group_that_could_not_leave_leaves_at_the_end(stage: Stage) -> None:
    device = stage.domain.attach(NIC, 1)
    group = stage.kernel.groups[1]
    real = group.unset_container

    def refuse() -> None:
        raise Refused(errno.EBUSY, "unset_container")

    group.unset_container = refuse  # type: ignore[method-assign]
    for end in (lambda: stage.domain.detach(device), stage.domain.close):
        with pytest.raises(Refused, match="unset_container"):
            end()
        assert (stage.domain.groups, stage.domain.active) == ([1], True)
    group.unset_container = real  # type: ignore[method-assign]
    stage.domain.close()
    assert stage.kernel.state() == ({}, [])
    stage.check()
