"""VFIO: the drivers vfio-pci and vfio_iommu_type1, and the container node."""

from __future__ import annotations

from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.kernel.modules import module
from kvmpass.host.sysfs import PCI_DRIVERS
from kvmpass.host.usage import VFIO_PCI

NODE = "dev/vfio/vfio"

NO_VFIO_PCI = BlockerTemplate(
    kind="no-vfio-pci",
    brief="{status}",
    cause="the driver vfio-pci is missing: it is neither built in nor a module that can be loaded ({seen})",
    remedy="use a kernel with CONFIG_VFIO_PCI, with its modules installed, and allow loading them",
    commands=("modprobe vfio-pci", "grep VFIO /boot/config-$(uname -r)"),
)
NO_TYPE1 = BlockerTemplate(
    kind="no-type1",
    brief="{status}",
    cause="vfio_iommu_type1 is missing: it is neither built in nor a module that can be loaded ({seen})",
    remedy="use a kernel with CONFIG_VFIO_IOMMU_TYPE1, with its modules installed, and allow loading them",
    commands=("modprobe vfio_iommu_type1", "grep VFIO /boot/config-$(uname -r)"),
)
NO_NODE = BlockerTemplate(
    kind="no-vfio-node",
    brief="not found",
    cause="the module vfio is loaded, but /dev/vfio/vfio does not exist",
    remedy="make sure that /dev is a devtmpfs, and that the kernel has CONFIG_VFIO_CONTAINER (or that of iommufd)",
    commands=("findmnt /dev", "grep VFIO /boot/config-$(uname -r)"),
)


@precondition(
    "vfio-pci",
    "Driver vfio-pci",
    "`/sys/bus/pci/drivers/vfio-pci`, `/sys/module`, the output of modprobe (for a recording: module lists and "
    "modprobe.d)",
    (NO_VFIO_PCI,),
    vital=True,
)
def _vfio_pci(context: CheckContext) -> Verdict:
    if context.sysfs.path(PCI_DRIVERS, VFIO_PCI).is_dir():
        return passed("present", Reading(f"/{PCI_DRIVERS}/{VFIO_PCI}", "present"))
    state = module(context.sysfs, VFIO_PCI)
    read = Reading(state.seen, state.value)
    if state.usable:
        return passed(str(state.status), read)
    return failed(NO_VFIO_PCI, read, status=state.status, seen=f"{state.seen}: {state.value}")


@precondition(
    "vfio-type1",
    "Driver vfio_iommu_type1",
    "`/sys/module`, the output of modprobe (for a recording: module lists and modprobe.d)",
    (NO_TYPE1,),
    needs=("vfio-pci",),
    vital=True,
)
def _type1(context: CheckContext) -> Verdict:
    state = module(context.sysfs, "vfio_iommu_type1")
    read = Reading(state.seen, state.value)
    if state.usable:
        return passed(str(state.status), read)
    return failed(NO_TYPE1, read, status=state.status, seen=f"{state.seen}: {state.value}")


@precondition("vfio-node", "VFIO's node", "`/dev/vfio/vfio`, `/sys/module/vfio`", (NO_NODE,), needs=("vfio-pci",))
def _node(context: CheckContext) -> Verdict:
    present = context.sysfs.path(NODE).exists()
    read = Reading(f"/{NODE}", "present" if present else "not found")
    if present:
        return passed("present", read)
    if context.sysfs.path("sys/module/vfio").is_dir():
        return failed(NO_NODE, read, Reading("/sys/module/vfio", "present"))
    return passed("created with the module", read)


CHECKS = (_vfio_pci, _type1, _node)
