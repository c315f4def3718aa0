"""Devices as JSON: the parts that the documents of several commands share."""

from __future__ import annotations

from typing import Any

from kvmpass import host
from kvmpass.host import view
from kvmpass.layout import Reserved


def blocker_document(blocker: host.Blocker) -> dict[str, Any]:
    """A blocker of a device, for ``list`` and ``show``."""
    return {
        "kind": blocker.kind,
        "brief": blocker.brief,
        "cause": blocker.cause,
        "remedy": blocker.remedy,
        "devices": [str(bdf) for bdf in blocker.devices],
    }


def host_document(status: view.HostStatus) -> dict[str, Any]:
    """Whether the host and the user can assign devices."""
    return {"ready": status.ready, "permitted": status.permitted, "cause": status.cause, "remedy": status.remedy}


def reserved_document(region: Reserved) -> dict[str, Any]:
    """A reserved range of IOVAs."""
    return {"start": hex(region.range.start), "last": hex(region.range.last), "kind": region.kind}


def link_document(link: view.Link | None) -> dict[str, Any] | None:
    """Speed (GT/s) and width of a PCI Express link, present and maximal."""
    if link is None:
        return None
    now = {"speed_gts": link.speed, "width": link.width}
    return {**now, "max_speed_gts": link.max_speed, "max_width": link.max_width}


def sriov_document(sriov: view.Sriov | None) -> dict[str, Any] | None:
    """The physical function of a virtual one, or the virtual functions of a physical one."""
    if sriov is None:
        return None
    return {
        "physical_function": str(sriov.physical) if sriov.physical else None,
        "virtual_functions": [str(bdf) for bdf in sriov.virtual],
        "enabled": sriov.enabled,
        "total": sriov.total,
    }


def device_document(status: view.DeviceStatus, whole: view.HostStatus) -> dict[str, Any]:
    """A device. ``assignable`` is false for every device of a host that is not ready."""
    device = status.device
    return {
        "bdf": str(device.bdf),
        "name": status.name,
        "vendor": f"{device.vendor:04x}",
        "device": f"{device.device:04x}",
        "subsystem_vendor": f"{device.subsystem_vendor:04x}",
        "subsystem_device": f"{device.subsystem_device:04x}",
        "class": f"{device.class_code:06x}",
        "class_words": view.class_words(device.class_code),
        "revision": f"{device.revision:02x}",
        "driver": device.driver,
        "driver_override": device.driver_override,
        "group": device.group,
        "assignable": whole.ready and not status.blockers,
        "blockers": [blocker_document(blocker) for blocker in status.blockers],
        "numa_node": device.numa_node,
        "link": link_document(status.link),
        "reset_methods": list(device.reset_methods),
        "power_state": device.power_state,
        "sriov": sriov_document(status.sriov),
    }
