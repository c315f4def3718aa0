"""The device's IOMMU group: what else is in it, and the memory that the firmware wants for it."""

from __future__ import annotations

from dataclasses import replace

from kvmpass.errors import GroupNotViable, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import Check, CheckContext, Reading, Verdict, failed, passed
from kvmpass.host.sysfs import IommuGroup, PciDevice
from kvmpass.host.usage import VFIO_PCI

# Drivers that leave the device's DMA to others (`driver_managed_dma` in struct pci_driver), so that the kernel
# still hands the group to user space (drivers/iommu/iommu.c: iommu_device_use_default_domain).
HARMLESS_DRIVERS = frozenset({VFIO_PCI, "pci-stub", "pcieport"})

NOT_VIABLE = BlockerTemplate(
    kind="group-not-viable",
    brief="group not viable",
    cause="{bdf} shares IOMMU group {group} with {busy}, which the host uses",
    remedy="a group is assigned as a whole: unbind the others from their drivers, or use another slot",
    error=GroupNotViable,
    bindable=True,
)
REFUSES_ONE_TO_ONE = (6, 6)  # the first Linux that does (drivers/iommu/iommu.c: require_direct)
ONE_TO_ONE = BlockerTemplate(
    kind="device-one-to-one",
    brief="VFIO refuses it",
    cause="the firmware wants memory mapped one to one for {bdf} or its group, {group} ({ranges}): VFIO refuses it",
    remedy="turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup, or update the firmware",
    error=NotAssignable,
    bindable=True,
)
ONE_TO_ONE_OLD = BlockerTemplate(
    kind="device-one-to-one-old",
    brief="newer kernels refuse the device",
    cause="the firmware wants memory mapped one to one for {bdf} or its group, {group} ({ranges}): VFIO refuses it "
    "from Linux 6.6 on; this kernel takes that memory away from the device",
    remedy="turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup, or update the firmware",
    warning=True,
)


def is_harmless(device: PciDevice) -> bool:
    """Whether its group can be handed to user space as long as this device's driver stays as it is."""
    return device.driver is None or device.driver in HARMLESS_DRIVERS or device.is_pci_bridge


def one_to_one(group: IommuGroup) -> list[str]:
    """Its ranges that the kernel must map one to one (IVMD); ``direct-relaxable`` ones it may drop."""
    return [str(reserved.range) for reserved in group.reserved if reserved.kind == "direct"]


def _others(context: CheckContext, wanted: set[Bdf]) -> list[PciDevice]:
    group = context.group
    members = group.devices if group is not None else ()
    return [device for bdf in members if bdf not in wanted and (device := context.look.device(bdf))]


def _viable(context: CheckContext) -> Verdict:
    bdf, group = context.device.bdf, context.group
    assert group is not None
    others = _others(context, {bdf})
    words = [f"{one.bdf} {context.names.short(one)} ({one.driver or 'no driver'})" for one in others]
    read = Reading(f"/sys/kernel/iommu_groups/{group.id}/devices", "; ".join(words) or "nothing else")
    busy = [one for one in others if one.bdf not in context.together and not is_harmless(one)]
    if not busy:
        return passed(f"{len(others)} others" if others else "alone", read)
    who = ", ".join(f"{one.bdf} (driver {one.driver})" for one in busy)
    found = NOT_VIABLE.fill(bdf=bdf, group=group.id, busy=who)
    return Verdict((read,), "", replace(found, devices=tuple(one.bdf for one in busy)))


def _one_to_one(context: CheckContext) -> Verdict:
    group = context.group
    assert group is not None
    ranges = one_to_one(group)
    read = Reading(f"/sys/kernel/iommu_groups/{group.id}/reserved_regions", f"direct {', '.join(ranges) or 'none'}")
    if not ranges:
        return passed("none", read)
    version = context.sysfs.kernel()
    known = Reading("/proc/sys/kernel/osrelease", ".".join(map(str, version)))
    template = ONE_TO_ONE if version >= REFUSES_ONE_TO_ONE else ONE_TO_ONE_OLD
    return failed(template, read, known, bdf=context.bdf, group=group.id, ranges=", ".join(ranges))


CHECKS = (
    Check(
        "device-one-to-one",
        "Its one-to-one memory",
        "ranges of the kind direct in the group's `reserved_regions` (from IVMD blocks of "
        "`/sys/firmware/acpi/tables/IVRS`)",
        (ONE_TO_ONE, ONE_TO_ONE_OLD),
        _one_to_one,
        ("device-kind",),
        device=True,
    ),
    Check(
        "device-group",
        "Its group",
        "the group's other devices and their drivers",
        (NOT_VIABLE,),
        _viable,
        ("device-kind",),
        device=True,
    ),
)
