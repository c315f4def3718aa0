"""Devices as JSON: the parts that the documents of several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpass import host
from kvmpass.host.backend import BackendChoice
from kvmpass.layout import Reserved

if TYPE_CHECKING:
    from kvmpass.dma import Domain
    from kvmpass.host.view.inventory import DeviceStatus, HostStatus
    from kvmpass.host.view.isolation import Sibling


def blocker_document(blocker: host.Blocker) -> dict[str, Any]:
    """Return the fields of a blocker, which are the same in every document."""
    return {
        "bdf": blocker.bdf,
        "kind": blocker.kind,
        "brief": blocker.brief,
        "cause": blocker.cause,
        "remedy": blocker.remedy,
        "commands": blocker.commands,
        "blocked_by": blocker.blocked_by,
    }


def backend_document(choice: BackendChoice | None) -> dict[str, Any] | None:
    """Return the IOMMU back end of a machine, and why it has that one."""
    return None if choice is None else {"name": choice.name, "reason": choice.reason}


def peers_document(domain: Domain) -> list[dict[str, Any]] | None:
    """Return the BARs that other devices reach by DMA; None without peer-to-peer."""
    if not domain.p2p:
        return None
    mappings = (mapping for mapping in domain.ledger if mapping.device is not None)
    return [{"bdf": m.device, "bar": m.bar, "iova": hex(m.iova), "size": m.size} for m in mappings]


def host_document(status: HostStatus) -> dict[str, Any]:
    """Whether the host and the user can assign devices."""
    blocker = status.blocker and blocker_document(status.blocker)
    return {"ready": status.ready, "permitted": status.permitted, "blocker": blocker}


def group_document(group: host.IommuGroup) -> dict[str, Any]:
    """Return the fields of an IOMMU group, without its devices."""
    return {"group": group.id, "type": group.type, "no_iommu": group.no_iommu}


def sibling_document(sibling: Sibling) -> dict[str, Any]:
    """Another device of an IOMMU group."""
    return {
        "bdf": sibling.device.bdf,
        "short_name": sibling.short_name,
        "driver": sibling.device.driver,
        "role": sibling.role,
    }


def reserved_document(region: Reserved) -> dict[str, Any]:
    """Return the fields of a reserved range of IOVAs."""
    return {"start": hex(region.range.start), "last": hex(region.range.last), "kind": region.kind}


def device_document(status: DeviceStatus, whole: HostStatus) -> dict[str, Any]:
    """Return the fields of a device. ``assignable`` is false for every device of a host that is not ready."""
    from kvmpass.host.view.classes import class_name

    device = status.device
    return {
        "bdf": device.bdf,
        "name": status.name,
        "short_name": status.short_name,
        "vendor": f"{device.vendor:04x}",
        "device": f"{device.device:04x}",
        "subsystem_vendor": f"{device.subsystem_vendor:04x}",
        "subsystem_device": f"{device.subsystem_device:04x}",
        "class": f"{device.class_code:06x}",
        "class_name": class_name(device.class_code),
        "revision": f"{device.revision:02x}",
        "driver": device.driver,
        "driver_override": device.driver_override,
        "group": device.group,
        "assignable": whole.ready and not status.blockers,
        "blockers": [blocker_document(blocker) for blocker in status.blockers],
        "numa_node": device.numa_node,
        "link": status.link,
        "reset_methods": device.reset_methods,
        "power_state": device.power_state,
        "sriov": status.sriov,
        "cdev": status.cdev,
    }
