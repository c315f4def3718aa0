"""The device's IOMMU group: whether it is viable, and the memory that the firmware wants direct-mapped for it."""

from __future__ import annotations

from kvmpass.errors import GroupNotViable, NotAssignable
from kvmpass.host.address import Bdf
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, device_precondition, failed, passed
from kvmpass.host.sysfs import VFIO_PCI, IommuGroup, PciDevice

# Drivers that do no DMA through the kernel's DMA API (`driver_managed_dma` in struct pci_driver), so that the kernel
# still lets user space own the group (drivers/iommu/iommu.c: iommu_device_use_default_domain).
HARMLESS_DRIVERS = frozenset({VFIO_PCI, "pci-stub", "pcieport"})

NOT_VIABLE = BlockerTemplate(
    kind="group-not-viable",
    brief="group not viable",
    cause="{bdf} shares IOMMU group {group} with {busy}, which the host uses",
    remedy="unbind the other devices from their drivers, or use another slot: a group is assigned as a whole",
    error=GroupNotViable,
    bindable=True,
)
REFUSES_DIRECT = (6, 6)  # the first Linux that does (drivers/iommu/iommu.c: require_direct)
DIRECT = BlockerTemplate(
    kind="device-direct-mapped",
    brief="VFIO refuses it",
    cause="the firmware wants memory direct-mapped for {bdf} or its group, {group} ({ranges}): VFIO refuses it",
    remedy="turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup, or update the firmware",
    error=NotAssignable,
    bindable=True,
)
DIRECT_OLD = BlockerTemplate(
    kind="device-direct-mapped-old",
    brief="newer kernels refuse the device",
    cause="the firmware wants memory direct-mapped for {bdf} or its group, {group} ({ranges}): VFIO refuses it "
    "from Linux 6.6 on; this kernel removes the mapping",
    remedy="turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup, or update the firmware",
    warning=True,
)


def is_harmless(device: PciDevice) -> bool:
    """Whether user space can own the group while this device keeps its driver."""
    return device.driver is None or device.driver in HARMLESS_DRIVERS or device.is_pci_bridge


def direct_ranges(group: IommuGroup) -> list[str]:
    """Return the group's ranges that the kernel must direct-map (IVMD), without ``direct-relaxable`` ones."""
    return [str(reserved.range) for reserved in group.reserved if reserved.kind == "direct"]


def _others(context: CheckContext, wanted: set[Bdf]) -> list[PciDevice]:
    group = context.group
    members = group.devices if group is not None else ()
    return [device for bdf in members if bdf not in wanted and (device := context.look.device(bdf))]


@device_precondition(
    "device-group", "Its group", "the group's other devices and their drivers", (NOT_VIABLE,), needs=("device-kind",)
)
def _viable(context: CheckContext) -> Verdict:
    bdf, group = context.device.bdf, context.group
    assert group is not None
    others = _others(context, {bdf})
    words = [f"{other.bdf} {context.look.names.short(other)} ({other.driver or 'no driver'})" for other in others]
    read = Reading(f"/sys/kernel/iommu_groups/{group.id}/devices", "; ".join(words) or "nothing else")
    busy = [other for other in others if other.bdf not in context.together and not is_harmless(other)]
    if not busy:
        return passed(f"{len(others)} others" if others else "alone", read)
    who = ", ".join(f"{other.bdf} (driver {other.driver})" for other in busy)
    blocked_by = tuple(other.bdf for other in busy)
    return failed(NOT_VIABLE, read, bdf=bdf, group=group.id, busy=who, blocked_by=blocked_by)


@device_precondition(
    "device-direct-mapped",
    "Its direct-mapped memory",
    "ranges of the type direct in the group's `reserved_regions` (from IVMD blocks of "
    "`/sys/firmware/acpi/tables/IVRS`)",
    (DIRECT, DIRECT_OLD),
    needs=("device-kind",),
)
def _direct(context: CheckContext) -> Verdict:
    group = context.group
    assert group is not None
    ranges = direct_ranges(group)
    read = Reading(f"/sys/kernel/iommu_groups/{group.id}/reserved_regions", f"direct {', '.join(ranges) or 'none'}")
    if not ranges:
        return passed("none", read)
    version = context.sysfs.kernel()
    known = Reading("/proc/sys/kernel/osrelease", ".".join(map(str, version)))
    template = DIRECT if version >= REFUSES_DIRECT else DIRECT_OLD
    return failed(template, read, known, bdf=context.bdf, group=group.id, ranges=", ".join(ranges))


CHECKS = (_direct, _viable)
