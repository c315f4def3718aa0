"""Objects over VFIO's file descriptors (include/uapi/linux/vfio.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.vfio.cdev import Cdev as Cdev
    from kvmpass.vfio.device import DependentDevice as DependentDevice
    from kvmpass.vfio.device import Device as Device
    from kvmpass.vfio.device import Irqs as Irqs
    from kvmpass.vfio.device import Region as Region
    from kvmpass.vfio.device import RegionInfo as RegionInfo
    from kvmpass.vfio.device import RegionMapping as RegionMapping
    from kvmpass.vfio.group import Container as Container
    from kvmpass.vfio.group import Group as Group

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.vfio.cdev": ("Cdev",),
        "kvmpass.vfio.device": (
            "DependentDevice",
            "Device",
            "Irqs",
            "Region",
            "RegionInfo",
            "RegionMapping",
        ),
        "kvmpass.vfio.group": (
            "Container",
            "Group",
        ),
    },
)
