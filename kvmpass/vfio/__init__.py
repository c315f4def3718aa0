"""Objects over VFIO's file descriptors (include/uapi/linux/vfio.h)."""

from kvmpass.vfio.cdev import Cdev
from kvmpass.vfio.device import DependentDevice, Device, Irqs, Region, RegionInfo, RegionMapping
from kvmpass.vfio.group import Container, Group

__all__ = [
    "Cdev",
    "Container",
    "DependentDevice",
    "Device",
    "Group",
    "Irqs",
    "Region",
    "RegionInfo",
    "RegionMapping",
]
