"""The VM's DMA domain, over either back end: what is attached, mapped and registered, whichever call fails."""

from __future__ import annotations

import errno
import itertools
import uuid
from typing import Any

import pytest
from support.dma_stage import DISK, NIC, SOUND, Stage
from support.fake_vfio import FakeKvmVfio, Refused

from kvmpass.dma import DmaMapping, Domain
from kvmpass.errors import AuditFailed, Closed, DeviceInUse, NotAssignable, ReservedRange
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.memory import HostMapping
from kvmpass.vfio.device import DependentDevice

# --- attach


def test_the_first_device_maps_everything_and_others_nothing(stage: Stage) -> None:
    assert (stage.domain.active, stage.domain.ledger) == (False, [])
    disk = stage.domain.attach(DISK, 2)
    assert disk.name == DISK
    ram, rom = DmaMapping(0, MIB, stage.ram.hva, True), DmaMapping(GIB, PAGE, stage.rom.hva, False)
    assert stage.domain.ledger == [ram, rom]
    assert stage.calls == [("map", Range(0, MIB)), ("map", Range(GIB, PAGE))]
    stage.check()
    stage.domain.attach(NIC, 1)
    stage.domain.attach(SOUND, 1)
    assert len(stage.calls) == 2
    stage.check()


def test_what_maps_memory_is_open_only_while_a_device_is_attached(stage: Stage) -> None:
    device = stage.domain.attach(DISK, 2)
    stage.domain.detach(device)
    with pytest.raises(Closed, match="open only while a device is attached"):
        stage.domain.backend.map(stage.ram)


def test_a_token_reaches_vfio(stage: Stage) -> None:
    token = uuid.uuid4()
    assert stage.domain.attach(DISK, 2, token).vf_token == token  # type: ignore[attr-defined]


def test_a_device_that_is_attached_already(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    before = stage.kernel.state()
    with pytest.raises(DeviceInUse, match=f"{NIC} is in this domain already"):
        stage.domain.attach(NIC, 1)
    assert stage.kernel.state() == before
    stage.check()
    assert stage.domain.attach(SOUND, 1).name == SOUND


def test_a_back_end_without_the_stages_of_an_attach_is_named(stage: Stage) -> None:
    class OneStage:
        active = False

        def attach(self, name: str, group: int) -> None:
            raise NotImplementedError

    backend: Any = OneStage()
    domain = Domain(stage.memory, lambda mapper: backend, stage.kvm)
    with pytest.raises(AttributeError, match="'OneStage' object has no attribute 'attaching'"):
        domain.attach(DISK, 2)
    assert (domain.ledger, stage.kernel.log, stage.kvm.files) == ([], [], set())


def test_a_domain_without_kvm(stage: Stage) -> None:
    domain = Domain(stage.memory, stage.backend)
    device = domain.attach(DISK, 2)
    assert "file_add" not in stage.kernel.log
    domain.detach(device)
    assert "file_del" not in stage.kernel.log
    assert not domain.active


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("present", [(), ((SOUND, 1),), ((DISK, 2),)], ids=["first", "same group", "other group"])
def test_a_failed_attach_leaves_nothing(stage: Stage, present: tuple[tuple[str, int], ...], after: bool) -> None:
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


def test_an_iommu_without_ranges_accepts_all_memory(stage: Stage) -> None:
    stage.kernel.ranges = ()
    stage.domain.attach(NIC, 1)
    stage.check()


# --- detach


def test_close_detaches_all_devices_and_is_idempotent(stage: Stage) -> None:
    for what in ((NIC, 1), (SOUND, 1), (DISK, 2)):
        stage.domain.attach(*what)
    stage.domain.close()
    assert stage.kernel.state() == ({}, [])
    stage.check()
    stage.domain.close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_detach_does_not_stop_the_others(stage: Stage, number: int) -> None:
    for what in ((NIC, 1), (DISK, 2)):
        stage.domain.attach(*what)
    stage.kernel.fail(number, after=True)
    with pytest.raises(Refused, match=r"device\.close|file_del|detach"):
        stage.domain.close()
    assert stage.kernel.state() == ({}, [])


@pytest.mark.parametrize("size", [0, 2 * PAGE])
def test_a_mapping_of_another_size_fails_the_audit(stage: Stage, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.domain.attach(NIC, 1)
    region = stage.memory.add_ram(4 * GIB, PAGE, "extra")
    stage.kernel.mappings.pop(Range(4 * GIB, PAGE))
    message = f"extra: {size:#x} bytes were mapped at 0x100000000, the ledger has 0x1000"
    with monkeypatch.context() as patch, pytest.raises(AuditFailed, match=message):
        patch.setattr(stage.domain.backend.inner, "unmap", lambda _: size)
        stage.domain.unmap_region(region)
    assert stage.calls[-1] == ("unmap", Range(4 * GIB, PAGE))


# --- memory


def test_regions_are_mapped_and_unmapped_by_one_call_each(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    stage.kernel.log.clear()
    stage.calls.clear()
    extra = stage.memory.add_rom(4 * GIB, b"extra")
    stage.check()
    assert stage.domain.ledger[-1] == DmaMapping(4 * GIB, PAGE, extra.hva, False)
    stage.memory.remove(extra)
    stage.check()
    assert stage.kernel.log == ["map", "unmap"]
    here = Range(4 * GIB, PAGE)
    assert stage.calls == [("map", here), ("unmap", here)]


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


def test_a_bar_is_not_mapped_for_devices(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    before, mapping = dict(stage.kernel.mappings), HostMapping(PAGE)
    region = stage.memory.add_bar(0xFEE0_0000, PAGE, mapping, 0, "bar")
    assert stage.kernel.mappings == before
    stage.domain.audit()
    stage.memory.remove(region)
    mapping.close()


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


def test_the_devices_are_registered_with_another_vm(stage: Stage) -> None:
    """It is unregistered from the old VM first: file_del after file_add would clear its VM (virt/kvm/vfio.c)."""
    for what in ((NIC, 1), (DISK, 2)):
        stage.domain.attach(*what)
    successor = FakeKvmVfio(stage.kernel, "successor")
    stage.domain.rebind_kvm(successor)
    assert stage.registered == {"successor"}
    assert (stage.kvm.files, successor.files) == (set(), stage.kernel.files)
    stage.kvm = successor
    stage.check()
    stage.domain.close()
    assert successor.files == set()


def test_a_first_vm_for_a_domain_that_had_none(stage: Stage) -> None:
    domain = Domain(stage.memory, stage.backend)
    domain.attach(DISK, 2)
    domain.rebind_kvm(stage.kvm)
    assert stage.registered == {"vm"}
    domain.close()


def test_a_reset_that_affects_other_devices_is_refused(stage: Stage) -> None:
    nic = stage.domain.attach(NIC, 1)
    names = (NIC, SOUND, "0000:01:00.2")
    stage.kernel.dependent = {NIC: [DependentDevice(name, 1, None) for name in names]}
    with pytest.raises(NotAssignable, match=rf"{NIC}'s bus would reset {SOUND}, 0000:01:00.2 too"):
        stage.domain.hot_reset(nic)
    assert nic.resets == []  # type: ignore[attr-defined]


def test_a_refused_vm_changes_nothing(stage: Stage) -> None:
    """Whichever call fails: the old one can be put back, as after a reset of the machine that failed."""
    for what in ((NIC, 1), (DISK, 2)):
        stage.domain.attach(*what)
    for number in range(1, 5):
        successor = FakeKvmVfio(stage.kernel, "successor")
        stage.kernel.fail(number)
        with pytest.raises(Refused, match="file_"):
            stage.domain.rebind_kvm(successor)
        stage.domain.rebind_kvm(stage.kvm)
        assert (stage.registered, successor.files) == ({"vm"}, set())
        stage.check()


def test_the_devices_can_be_without_a_vm(stage: Stage) -> None:
    stage.domain.attach(NIC, 1)
    stage.domain.rebind_kvm(None)
    assert (stage.kvm.files, stage.registered) == (set(), {None})
    stage.domain.attach(DISK, 2)
    stage.domain.rebind_kvm(stage.kvm)
    assert stage.registered == {"vm"}
    stage.check()


# --- what the kernel does not undo


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_region_that_may_still_be_mapped_stays_recorded(
    stage: Stage, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map fails, and the unmap that is to make sure of it fails too."""
    stage.domain.attach(NIC, 1)

    def refuse(*_: object) -> int:
        raise Refused(errno.ENOMEM, "unmap")

    stage.kernel.fail(1, after=after)
    with monkeypatch.context() as patch, pytest.raises(Refused, match="map") as refused:
        patch.setattr(stage.domain.backend, "unmap", refuse)
        stage.memory.add_ram(4 * GIB, PAGE, "extra")
    assert any("unmap" in note for note in refused.value.__notes__)
    [*_, region] = stage.memory
    assert (region.name, stage.domain.holds(region)) == ("extra", True)
    assert region.hva, "devices may reach it"
    if not after:
        stage.kernel.mappings[region.range] = (region.hva, True)
    stage.memory.remove(region)
    assert not stage.domain.holds(region)
    stage.check()


def test_a_region_that_was_not_mapped_after_all_can_be_removed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls had failed before they did anything. Of a mapping that was acknowledged this fails the audit."""
    stage.domain.attach(NIC, 1)

    def refuse(*_: object) -> int:
        raise Refused(errno.ENOMEM, "unmap")

    stage.kernel.fail(1)
    with monkeypatch.context() as patch, pytest.raises(Refused, match="map"):
        patch.setattr(stage.domain.backend, "unmap", refuse)
        stage.memory.add_ram(4 * GIB, PAGE, "extra")
    [*_, region] = stage.memory
    stage.domain.unmap_region(region)
    stage.domain.map_region(region)
    stage.check()
    stage.kernel.mappings.pop(region.range)
    with pytest.raises(AuditFailed, match="extra: 0x0 bytes were mapped"):
        stage.memory.remove(region)
    stage.memory.remove(region)


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
