"""What the host uses a device for at this moment.

Each module finds uses of one kind, below the device at any depth (a disk on a SATA port, a USB stick on a controller)
and, if its driver registers them elsewhere, outside its sysfs directory. They are imported for a device with a driver
other than vfio-pci.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from kvmpass._dataclass import dataclass
from kvmpass.host.address import Bdf
from kvmpass.host.look import Look
from kvmpass.host.sysfs import IOMMU_GROUPS, NOIOMMU_NAME, PCI_DEVICES, VFIO_PCI, IommuGroup, PciDevice, Sysfs

# Drivers that only claim a device.
_PLACEHOLDERS = (None, VFIO_PCI, "pci-stub")
# Base classes whose uses are all visible in sysfs or procfs: storage, network, display, multimedia, communication,
# input, wireless; classes FireWire and USB.
_TRACED = frozenset({0x01, 0x02, 0x03, 0x04, 0x07, 0x09, 0x0D})
_TRACED_BUSES = frozenset({0x0C00, 0x0C03})
_OWN_NODE = "/dev/vfio/devices/{}"
VSOCK = "vmw_vsock_virtio_transport"
_TRACED_VIRTIO = frozenset({"9pnet_virtio", "virtiofs", "virtio_console", VSOCK})


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a device by the host or by a process."""

    text: str
    """What uses it, or why it may be in use, as a clause."""
    seen: bool = True
    """Whether the use is visible; if not, it is only possible."""
    waits: bool = False
    """Whether unbinding the driver blocks until this use ends."""


def uses(look: Look, device: PciDevice) -> list[Use]:
    """Return each use of the device by the host or a process, and each that may exist but is not visible.

    Processes and namespaces of other users are visible to root only.
    """
    found = [*_virtual_functions(look, device)]
    if device.driver != VFIO_PCI:  # the host no longer uses it
        from kvmpass.host.usage import console, kernel, network, nodes, shares, storage

        found += chain(
            console.console(look, device),
            kernel.kernel(look, device),
            storage.storage(look, device),
            network.network(look, device),
            shares.shares(look, device),
            nodes.open_nodes(look, device),
        )
    return list(dict.fromkeys(found))


def _virtual_functions(look: Look, device: PciDevice) -> Iterator[Use]:
    if "sriov_numvfs" not in look.attributes(device.bdf):
        return
    count = look.sysfs.number(PCI_DEVICES, str(device.bdf), "sriov_numvfs") or 0
    if count:
        yield Use(f"{count} virtual functions are enabled on it and would be removed")


def usage(look: Look, device: PciDevice) -> list[str]:
    """Return one clause for each visible use."""
    return [use.text for use in uses(look, device) if use.seen]


def untraced(look: Look, device: PciDevice) -> str:
    """Return why a device without visible use may still be in use, as a clause; empty if it cannot.

    This does not block an assignment.
    """
    if device.driver in _PLACEHOLDERS:
        return ""
    from kvmpass.host.usage import network, shares

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
    """Return the nodes through which a process can own the device: its group's, and its own character device."""
    nodes = []
    if group is not None:
        no_iommu = sysfs.text(IOMMU_GROUPS, str(group), "name") == NOIOMMU_NAME
        nodes.append(_group_node(group, no_iommu))
    return [*nodes, *map(_OWN_NODE.format, sysfs.names(PCI_DEVICES, str(bdf), "vfio-dev"))]


def known_nodes(look: Look, bdf: Bdf, group: IommuGroup | None) -> list[str]:
    """Return the same nodes, as they are at the moment of ``look``."""
    own = look.sysfs.names(PCI_DEVICES, str(bdf), "vfio-dev") if "vfio-dev" in look.attributes(bdf) else []
    return [*([_group_node(group.id, group.no_iommu)] if group is not None else []), *map(_OWN_NODE.format, own)]


def _group_node(group: int, no_iommu: bool) -> str:
    return f"/dev/vfio/{'noiommu-' if no_iommu else ''}{group}"  # drivers/vfio/group.c


__all__ = ["VSOCK", "Use", "known_nodes", "untraced", "usage", "uses", "vfio_nodes"]
