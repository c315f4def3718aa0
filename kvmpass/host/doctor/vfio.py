"""VFIO and iommufd: the driver vfio-pci, the interface to the IOMMU, and what type 1 needs."""

from __future__ import annotations

from kvmpass.host.backend import IOMMU_NODE, IOMMUFD, TYPE1_MODULE, cdevs
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.kernel.modules import module
from kvmpass.host.sysfs import PCI_DRIVERS, VFIO_PCI

NODE = "dev/vfio/vfio"

NO_VFIO_PCI = BlockerTemplate(
    kind="no-vfio-pci",
    brief="{status}",
    cause="the driver vfio-pci is missing: it is neither built in nor a module that can be loaded ({seen})",
    remedy="use a kernel with CONFIG_VFIO_PCI, with its modules installed, and allow loading them",
    commands=("modprobe vfio-pci", "grep VFIO /boot/config-$(uname -r)"),
)
NO_IOMMUFD = BlockerTemplate(
    kind="no-iommufd",
    brief="iommufd is unavailable",
    cause="iommufd was asked for and is unavailable: {obstacle}",
    remedy="use the back end type1, or auto, which uses iommufd where it is available; or a kernel with "
    "CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
    commands=("grep -e IOMMUFD -e VFIO_DEVICE_CDEV /boot/config-$(uname -r)",),
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
    if context.sysfs.exists(PCI_DRIVERS, VFIO_PCI):
        return passed("present", Reading(f"/{PCI_DRIVERS}/{VFIO_PCI}", "present"))
    state = module(context.sysfs, VFIO_PCI)
    read = Reading(state.seen, state.value)
    if state.usable:
        return passed(str(state.status), read)
    return failed(NO_VFIO_PCI, read, status=state.status, seen=f"{state.seen}: {state.value}")


@precondition(
    "iommu-backend",
    "IOMMU back end",
    "`/dev/iommu`, `/proc/devices`, the device's `vfio-dev`, and whether this user may open the nodes",
    (NO_IOMMUFD,),
    needs=("vfio-pci",),
    vital=True,
)
def _backend(context: CheckContext) -> Verdict:
    sysfs, choice = context.sysfs, context.backend
    read = [Reading(f"/{IOMMU_NODE}", "present" if sysfs.exists(IOMMU_NODE) else "not found")]
    if context.bdf is not None:
        nodes = " ".join(f"/{node}" for node in cdevs(sysfs, context.bdf))
        read.append(Reading(f"character device of {context.bdf}", nodes or "none"))
    if choice.obstacle:
        return failed(NO_IOMMUFD, *read, obstacle=choice.obstacle)
    return passed(str(choice), *read)


@precondition(
    "vfio-type1",
    "Driver vfio_iommu_type1",
    "`/sys/module`, the output of modprobe (for a recording: module lists and modprobe.d)",
    (NO_TYPE1,),
    needs=("iommu-backend",),
    vital=True,
)
def _type1(context: CheckContext) -> Verdict:
    state = module(context.sysfs, TYPE1_MODULE)
    read = Reading(state.seen, state.value)
    if context.backend.name == IOMMUFD:
        return passed("not needed with iommufd", read)
    if context.passed is not None:
        return passed("in use: its descriptor was passed", read)
    if state.usable:
        return passed(str(state.status), read)
    return failed(
        NO_TYPE1,
        read,
        Reading("back end", str(context.backend)),
        status=state.status,
        seen=f"{state.seen}: {state.value}",
    )


@precondition(
    "vfio-node", "VFIO's node", "`/dev/vfio/vfio`, `/sys/module/vfio`", (NO_NODE,), needs=("iommu-backend",)
)
def _node(context: CheckContext) -> Verdict:
    present = context.sysfs.exists(NODE)
    read = Reading(f"/{NODE}", "present" if present else "not found")
    if context.backend.name == IOMMUFD:
        return passed("not needed with iommufd", read)
    if present:
        return passed("present", read)
    if context.sysfs.exists("sys/module/vfio"):
        return failed(NO_NODE, read, Reading("/sys/module/vfio", "present"))
    return passed("created with the module", read)


CHECKS = (_vfio_pci, _backend, _type1, _node)
