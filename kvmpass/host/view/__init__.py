"""PCI devices and IOMMU groups of this host, for display: inventory, description, filters, events."""

from kvmpass.host.view.capabilities import (
    Acs,
    Ats,
    Capabilities,
    Express,
    Pasid,
    Power,
    Pri,
    SriovRegisters,
)
from kvmpass.host.view.classes import class_name
from kvmpass.host.view.description import BarInfo, Description, describe
from kvmpass.host.view.filters import parse_filter, select
from kvmpass.host.view.inventory import (
    DeviceStatus,
    HostStatus,
    Inventory,
    Link,
    Sriov,
    device_status,
    host_status,
    inventory,
    sriov_of,
)
from kvmpass.host.view.isolation import Bridge, Sibling, siblings
from kvmpass.host.view.watching import HostEvent, watch_events

__all__ = [
    "Acs",
    "Ats",
    "BarInfo",
    "Bridge",
    "Capabilities",
    "Description",
    "DeviceStatus",
    "Express",
    "HostEvent",
    "HostStatus",
    "Inventory",
    "Link",
    "Pasid",
    "Power",
    "Pri",
    "Sibling",
    "Sriov",
    "SriovRegisters",
    "class_name",
    "describe",
    "device_status",
    "host_status",
    "inventory",
    "parse_filter",
    "select",
    "siblings",
    "sriov_of",
    "watch_events",
]
