"""VFIO: its driver for PCI devices, its IOMMU driver, its node."""

from __future__ import annotations

from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import Check, CheckContext, Reading, Verdict, failed, passed
from kvmpass.host.kernel.modules import module
from kvmpass.host.sysfs import PCI_DRIVERS
from kvmpass.host.usage import VFIO_PCI

NODE = "dev/vfio/vfio"

NO_VFIO_PCI = BlockerTemplate(
    kind="no-vfio-pci",
    brief="{status}",
    cause="the driver vfio-pci is missing: it is neither in this kernel nor a module that can be loaded ({seen})",
    remedy="use a kernel with CONFIG_VFIO_PCI, with its modules installed, and let it load them",
    commands=("modprobe vfio-pci", "grep VFIO /boot/config-$(uname -r)"),
)
NO_TYPE1 = BlockerTemplate(
    kind="no-type1",
    brief="{status}",
    cause="vfio_iommu_type1 is missing: it is neither in this kernel nor a module that can be loaded ({seen})",
    remedy="use a kernel with CONFIG_VFIO_IOMMU_TYPE1, with its modules installed, and let it load them",
    commands=("modprobe vfio_iommu_type1", "grep VFIO /boot/config-$(uname -r)"),
)
NO_NODE = BlockerTemplate(
    kind="no-vfio-node",
    brief="not there",
    cause="vfio is in use by this kernel, but there is no /dev/vfio/vfio",
    remedy="see that /dev is a devtmpfs, and that the kernel has CONFIG_VFIO_CONTAINER (or iommufd's stand-in)",
    commands=("findmnt /dev", "grep VFIO /boot/config-$(uname -r)"),
)


def _vfio_pci(context: CheckContext) -> Verdict:
    if context.sysfs.path(PCI_DRIVERS, VFIO_PCI).is_dir():
        return passed("there", Reading(f"/{PCI_DRIVERS}/{VFIO_PCI}", "there"))
    state = module(context.sysfs, VFIO_PCI)
    read = Reading(state.seen, state.value)
    if state.usable:
        return passed(f"{state.status}", read)
    return failed(NO_VFIO_PCI, read, status=state.status, seen=f"{state.seen}: {state.value}")


def _type1(context: CheckContext) -> Verdict:
    state = module(context.sysfs, "vfio_iommu_type1")
    read = Reading(state.seen, state.value)
    if state.usable:
        return passed(f"{state.status}", read)
    return failed(NO_TYPE1, read, status=state.status, seen=f"{state.seen}: {state.value}")


def _node(context: CheckContext) -> Verdict:
    there = context.sysfs.path(NODE).exists()
    read = Reading(f"/{NODE}", "there" if there else "not there")
    if there:
        return passed("there", read)
    if context.sysfs.path("sys/module/vfio").is_dir():
        return failed(NO_NODE, read, Reading("/sys/module/vfio", "there"))
    return passed("comes with the module", read)


CHECKS = (
    Check(
        "vfio-pci",
        "Driver vfio-pci",
        "`/sys/bus/pci/drivers/vfio-pci`, `/sys/module`, what modprobe says (of a tree its lists and modprobe.d)",
        (NO_VFIO_PCI,),
        _vfio_pci,
        vital=True,
    ),
    Check(
        "vfio-type1",
        "Driver vfio_iommu_type1",
        "`/sys/module`, what modprobe says (of a tree its lists and modprobe.d)",
        (NO_TYPE1,),
        _type1,
        ("vfio-pci",),
        vital=True,
    ),
    Check("vfio-node", "VFIO's node", "`/dev/vfio/vfio`, `/sys/module/vfio`", (NO_NODE,), _node, ("vfio-pci",)),
)
