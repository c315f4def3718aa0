"""Whether a device exists, responds, and is of a kind that can be assigned."""

from __future__ import annotations

from kvmpass.errors import NoSuchDevice, NotAssignable
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, device_precondition, failed, passed
from kvmpass.host.sysfs import PCI_DEVICES, PciDevice

NO_DEVICE = BlockerTemplate(
    kind="no-device",
    brief="not found",
    cause="there is no PCI device {bdf}",
    remedy="kvmpass list shows the devices of this host; a rescan of the bus may find it again",
    commands=("echo 1 > /sys/bus/pci/rescan",),
    error=NoSuchDevice,
)
BRIDGE = BlockerTemplate(
    kind="bridge",
    brief="is a bridge",
    cause="{bdf} is a bridge (class {class_code}): bridges cannot be assigned",
    remedy="assign a device behind it",
    error=NotAssignable,
)
NO_GROUP = BlockerTemplate(
    kind="no-group",
    brief="no IOMMU group",
    cause="{bdf} has no IOMMU group: {what}, so its DMA would not be translated",
    remedy="turn on the IOMMU (AMD-Vi) in the firmware's setup if no device of this host has a group",
    error=NotAssignable,
)
NO_IOMMU = BlockerTemplate(
    kind="no-iommu",
    brief="no-IOMMU group",
    cause="{bdf} is in a no-IOMMU group ({group}): its DMA would not be translated",
    remedy="disable enable_unsafe_noiommu_mode of vfio and turn on the IOMMU (AMD-Vi)",
    error=NotAssignable,
)
NO_RESPONSE = BlockerTemplate(
    kind="device-no-response",
    brief="does not respond ({power})",
    cause="{bdf} does not respond: its configuration space reads as ones (power state {power})",
    remedy="remove it and rescan the bus: it does not resume from D3cold, or hangs; if that does not help, "
    "power-cycle this machine. If it happens again, disable its runtime power management",
    commands=(
        "echo 1 > /sys/bus/pci/devices/{bdf}/remove; echo 1 > /sys/bus/pci/rescan",
        "echo 0 > /sys/bus/pci/devices/{bdf}/d3cold_allowed; echo on > /sys/bus/pci/devices/{bdf}/power/control",
    ),
    error=NotAssignable,
)
COLD = BlockerTemplate(
    kind="device-cold",
    brief="stays in D3cold",
    cause="{bdf} stays in D3cold after its configuration space was read, which resumes a device",
    remedy="disable its runtime power management; if it does not resume, power-cycle this machine",
    commands=(
        "echo 0 > /sys/bus/pci/devices/{bdf}/d3cold_allowed; echo on > /sys/bus/pci/devices/{bdf}/power/control",
    ),
    warning=True,
)


def header_type(header: bytes) -> int | None:
    """Bits 0-6 of configuration byte 0x0e: 0 normal, 1 PCI bridge, 2 CardBus (PCI 3.0, 6.1); None if unknown."""
    return header[0x0E] & 0x7F if len(header) > 0x0E else None


def is_bridge(device: PciDevice, header: bytes) -> bool:
    """Whether it is a bridge by its class, or by the header of its configuration space (empty: unknown)."""
    return device.is_bridge or header_type(header) in (1, 2)


@device_precondition("device", "Device", f"`/{PCI_DEVICES}/BDF`", (NO_DEVICE,))
def _present(context: CheckContext) -> Verdict:
    if not context.present:
        return failed(NO_DEVICE, Reading(f"/{PCI_DEVICES}/{context.bdf}", "not found"), bdf=context.bdf)
    device = context.device
    name = context.look.names.short(device)
    return passed(f"{name}, driver {device.driver or 'none'}", Reading(f"/{PCI_DEVICES}/{device.bdf}", name))


@device_precondition(
    "device-kind",
    "Can be assigned",
    "`class`, the header type, `iommu_group`, the group's `name`",
    (BRIDGE, NO_GROUP, NO_IOMMU),
    needs=("device", "groups"),
)
def _kind(context: CheckContext) -> Verdict:
    """Return what a change of the driver cannot fix."""
    device, bdf = context.device, context.device.bdf
    read = Reading(f"/{PCI_DEVICES}/{bdf}", f"class {device.class_code:06x}, group {device.group}")
    if is_bridge(device, context.header):
        return failed(BRIDGE, read, bdf=bdf, class_code=f"{device.class_code:06x}")
    if context.group is None:
        what = "it is the IOMMU" if device.class_code >> 8 == 0x0806 else "the IOMMU does not cover it"
        return failed(NO_GROUP, read, bdf=bdf, what=what)
    if context.group.no_iommu:
        return failed(NO_IOMMU, read, bdf=bdf, group=context.group.id)
    return passed(f"group {device.group}", read)


@device_precondition(
    "device-responds",
    "Responds",
    "the first bytes of its configuration space; `power_state`, `d3cold_allowed`, `power/control`",
    (NO_RESPONSE, COLD),
    needs=("device",),
)
def _responds(context: CheckContext) -> Verdict:
    device, base = context.device, f"{PCI_DEVICES}/{context.bdf}"
    header = context.header  # not only the IDs: those of a virtual function read as ones
    # Only a read that may resume it changes this.
    power = (context.sysfs.text(base, "power_state") or "unknown") if context.wake else device.power_state
    read = [Reading(f"/{base}/config", header[:4].hex(" ") or "not read"), Reading(f"/{base}/power_state", power)]
    for name in ("d3cold_allowed", "power/control", "power/runtime_status") if context.shown else ():
        value = context.sysfs.text(base, name)
        if value is not None:
            read.append(Reading(f"/{base}/{name}", value))
    if header and not header.strip(b"\xff"):
        return failed(NO_RESPONSE, *read, bdf=device.bdf, power=power)
    return failed(COLD, *read, bdf=device.bdf) if power == "D3cold" and context.wake else passed(power, *read)


CHECKS = (_present, _kind, _responds)
