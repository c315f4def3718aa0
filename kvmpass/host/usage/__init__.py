"""What the host does with a device at this moment: the reasons not to take it away.

Each module looks for uses of one kind, below the device at any depth (a disk at a SATA port, a USB stick at a
controller) and, where its driver shows them elsewhere, beside it.
"""

from __future__ import annotations

from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.look import Look
from kvmpass.host.sysfs import IOMMU_GROUPS, NOIOMMU_NAME, PCI_DEVICES, PciDevice, Sysfs
from kvmpass.host.usage import console, kernel, network, nodes, shares, storage
from kvmpass.host.usage.model import Use
from kvmpass.host.usage.storage import block_devices

VFIO_PCI = "vfio-pci"
# Drivers that do nothing with a device but keep it.
_KEEPERS = (None, VFIO_PCI, "pci-stub")
# Whatever is used of these has a name in sysfs, and a use of it a trace: storage, network, display, multimedia,
# serial lines, input, USB and FireWire.
_TRACED = frozenset({0x01, 0x02, 0x03, 0x04, 0x07, 0x09, 0x0D})
_TRACED_BUSES = frozenset({0x0C00, 0x0C03})
_TRACED_VIRTIO = frozenset({"9pnet_virtio", "virtiofs", "virtio_console", kernel.VSOCK})


def uses(look: Look, device: PciDevice) -> list[Use]:
    """Each use the host or another process makes of the device, or may make unseen; empty when it is idle.

    Without root other users' processes and namespaces stay unseen.
    """
    found = [*kernel.virtual_functions(look, device)]
    if device.driver != VFIO_PCI:  # which its owners have given up already
        found += chain(
            console.console(look, device),
            kernel.kernel(look, device),
            storage.storage(look, device),
            network.network(look, device),
            shares.shares(look, device),
            nodes.open_nodes(look, device),
        )
    return list(dict.fromkeys(found))


def usage(look: Look, device: PciDevice) -> list[str]:
    """One clause for each use that is seen."""
    return [use.text for use in uses(look, device) if use.seen]


def untraced(look: Look, device: PciDevice) -> str:
    """Why a device without a use that is seen need not be idle, as a clause; empty where it is.

    This is no reason against it.
    """
    if device.driver in _KEEPERS:
        return ""
    routes = network.idle_routes(look, device)
    if routes:
        return f"{', '.join(routes)}: datagrams leave no trace"
    if device.class_code >> 16 in _TRACED or device.class_code >> 8 in _TRACED_BUSES:
        return ""
    children = look.below(shares.VIRTIO, device.bdf)
    drivers = {look.sysfs.link(shares.VIRTIO, name, "driver") for name in children} if children else {device.driver}
    named = " and ".join(sorted(driver for driver in drivers if driver and driver not in _TRACED_VIRTIO))
    return f"what {named} does for the kernel leaves no trace" if named else ""


def vfio_nodes(sysfs: Sysfs, bdf: Bdf, group: int | None) -> list[str]:
    """The nodes through which a process can own the device: its group's, its own character device."""
    nodes = []
    if group is not None:
        no_iommu = sysfs.text(IOMMU_GROUPS, str(group), "name") == NOIOMMU_NAME
        nodes.append(f"/dev/vfio/{'noiommu-' if no_iommu else ''}{group}")  # drivers/vfio/group.c
    nodes += [f"/dev/vfio/devices/{name}" for name in sysfs.names(PCI_DEVICES, str(bdf), "vfio-dev")]
    return nodes


__all__ = ["VFIO_PCI", "Use", "block_devices", "untraced", "usage", "uses", "vfio_nodes"]
