"""What must hold of a device and its group before it is taken; what must hold of the host is in ``doctor``.

Every check only reads. Each refusal is one exception whose message is the cause and whose note is the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from kvmpass.errors import DeviceInUse, GroupNotViable, NoSuchDevice, NotAssignable
from kvmpass.host import processes
from kvmpass.host.address import Bdf
from kvmpass.host.problems import Blocker, Problem
from kvmpass.host.processes import Holders
from kvmpass.host.sysfs import IommuGroup, PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI, usage, vfio_nodes

# Drivers that leave the device's DMA to others (`driver_managed_dma` in struct pci_driver), so that the kernel
# still hands the group to user space (drivers/iommu/iommu.c: iommu_device_use_default_domain).
HARMLESS_DRIVERS = frozenset({VFIO_PCI, "pci-stub", "pcieport"})

BRIDGE = Problem(
    kind="bridge",
    brief="is a bridge",
    cause="{bdf} is a bridge (class {class_code}): bridges cannot be assigned",
    remedy="assign a device behind it",
    error=NotAssignable,
)
NO_GROUP = Problem(
    kind="no-group",
    brief="no IOMMU group",
    cause="{bdf} has no IOMMU group: {what}, so nothing would confine its DMA",
    remedy="turn on the IOMMU (AMD-Vi) in the firmware's setup if no device of this host has a group",
    error=NotAssignable,
)
NO_IOMMU = Problem(
    kind="no-iommu",
    brief="no-IOMMU group",
    cause="{bdf} is in a no-IOMMU group ({group}): nothing would confine its DMA",
    remedy="switch off vfio's enable_unsafe_noiommu_mode and turn on the IOMMU (AMD-Vi)",
    error=NotAssignable,
)
NOT_VIABLE = Problem(
    kind="group-not-viable",
    brief="group not viable",
    cause="{bdf} shares IOMMU group {group} with {busy}, which the host uses",
    remedy="a group is assigned as a whole: unbind the others from their drivers, or use another slot",
    error=GroupNotViable,
)
REFUSES_ONE_TO_ONE = (6, 6)  # the first Linux that does (drivers/iommu/iommu.c: require_direct)
ONE_TO_ONE = Problem(
    kind="device-one-to-one",
    brief="VFIO refuses it",
    cause="the firmware wants memory mapped one to one for {bdf} or its group, {group} ({ranges}): VFIO refuses it",
    remedy="turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup, or update the firmware",
    error=NotAssignable,
)
ASSIGNED = Problem(
    kind="assigned",
    brief="already assigned",
    cause="{bdf} {what} {who}",
    remedy="stop that process first, or choose another device",
    error=DeviceInUse,
)
IN_USE = Problem(
    kind="in-use",
    brief="in use here",
    cause="{bdf} is in use: {reasons}",
    remedy="unmount, switch off or close what uses it, then try again",
    error=DeviceInUse,
)


def check_assignable(sysfs: Sysfs, bdf: Bdf, together: Iterable[Bdf] = ()) -> PciDevice:
    """Return the device if it can be taken now; ``together`` names devices that are taken with it.

    Raises ``NoSuchDevice``, or the first of :func:`blockers`: ``NotAssignable`` (bridge, no IOMMU group, no-IOMMU
    group); ``GroupNotViable`` with the siblings and their drivers; ``DeviceInUse`` with every use that is visible.
    A device that this very process holds is in use too.
    """
    device = sysfs.device(bdf)
    for blocker in blockers(sysfs, device, together):
        raise blocker.exception()
    return device


def blockers(
    sysfs: Sysfs, device: PciDevice, together: Iterable[Bdf] = (), holders: Holders | None = None
) -> Iterator[Blocker]:
    """Every reason why the device cannot be taken now, the most basic first; none: it can.

    ``holders`` tells who has nodes open: :class:`~kvmpass.host.processes.OpenNodes`, one look at all processes, for
    whoever asks about many devices. Without it each call looks anew.
    """
    holders = holders or partial(processes.holders, sysfs)
    unfit = _unfit(sysfs, device)
    if unfit is not None:
        yield unfit
    elif device.group is not None:
        group = sysfs.group(device.group)
        yield from _refused(sysfs, device, group)
        yield from _unviable(sysfs, device, group, {device.bdf, *together})
        yield from users(sysfs, device, holders)


def users(sysfs: Sysfs, device: PciDevice, holders: Holders | None = None) -> Iterator[Blocker]:
    """Of the reasons against a device those for which somebody must let go first: ``assigned`` and ``in-use``."""
    holders = holders or partial(processes.holders, sysfs)
    yield from _assigned(sysfs, device, holders)
    reasons = usage(sysfs, device, holders)
    if reasons:
        yield IN_USE.found(bdf=device.bdf, reasons="; ".join(reasons))


def _unfit(sysfs: Sysfs, device: PciDevice) -> Blocker | None:
    """What no driver change would cure."""
    bdf = device.bdf
    if device.is_bridge or sysfs.header_type(bdf) in (1, 2):
        return BRIDGE.found(bdf=bdf, class_code=f"{device.class_code:06x}")
    if device.group is None:
        what = "it is the IOMMU" if device.class_code >> 8 == 0x0806 else "the IOMMU does not cover it"
        return NO_GROUP.found(bdf=bdf, what=what)
    group = sysfs.group(device.group)
    if group.no_iommu:
        return NO_IOMMU.found(bdf=bdf, group=group.id)
    return None


def one_to_one(group: IommuGroup) -> list[str]:
    """Its ranges that the kernel must map one to one (IVMD); ``direct-relaxable`` ones it may drop."""
    return [str(reserved.range) for reserved in group.reserved if reserved.kind == "direct"]


def _refused(sysfs: Sysfs, device: PciDevice, group: IommuGroup) -> Iterator[Blocker]:
    ranges = one_to_one(group)
    if ranges and sysfs.kernel() >= REFUSES_ONE_TO_ONE:
        yield ONE_TO_ONE.found(bdf=device.bdf, group=group.id, ranges=", ".join(ranges))


def _unviable(sysfs: Sysfs, device: PciDevice, group: IommuGroup, ours: set[Bdf]) -> Iterator[Blocker]:
    siblings = [sibling for other in group.devices if other not in ours and (sibling := _present(sysfs, other))]
    busy = [sibling for sibling in siblings if not is_harmless(sibling)]
    if busy:
        who = ", ".join(f"{sibling.bdf} (driver {sibling.driver})" for sibling in busy)
        found = NOT_VIABLE.found(bdf=device.bdf, group=group.id, busy=who)
        yield replace(found, devices=tuple(sibling.bdf for sibling in busy))


def _present(sysfs: Sysfs, bdf: Bdf) -> PciDevice | None:
    try:
        return sysfs.device(bdf)
    except NoSuchDevice:  # it went while we looked
        return None


def is_harmless(device: PciDevice) -> bool:
    """Whether its group can be handed to user space as long as this device's driver stays as it is."""
    return device.driver is None or device.driver in HARMLESS_DRIVERS or device.is_pci_bridge


def _assigned(sysfs: Sysfs, device: PciDevice, holders: Holders) -> Iterator[Blocker]:
    members = () if device.group is None else sysfs.group(device.group).devices
    own = vfio_nodes(sysfs, device.bdf, device.group)
    siblings = [node for other in members if other != device.bdf for node in vfio_nodes(sysfs, other, None)]
    what = "is assigned by" if len(members) <= 1 else f"is in IOMMU group {device.group}, assigned by"
    yield from _held(holders, [*own, *siblings], device, what)
    for function in sysfs.virtual_functions(device.bdf):  # they vanish with its driver, or keep it waiting
        found = _present(sysfs, function)
        nodes = vfio_nodes(sysfs, function, found.group) if found is not None else []
        yield from _held(holders, nodes, device, f"has the virtual function {function}, assigned by")


def _held(holders: Holders, nodes: list[str], device: PciDevice, what: str) -> Iterator[Blocker]:
    held = holders(nodes)
    if held:
        who = " and ".join(str(process) for process in sorted({one for found in held.values() for one in found}))
        yield ASSIGNED.found(bdf=device.bdf, what=what, who=who)
