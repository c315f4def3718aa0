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
    capabilities_of,
)
from kvmpass.host.view.classes import class_name
from kvmpass.host.view.description import BarInfo, Description, describe
from kvmpass.host.view.filters import Filter, parse_filter, select
from kvmpass.host.view.inventory import (
    DeviceStatus,
    HostStatus,
    Inventory,
    Link,
    Sriov,
    device_status,
    host_status,
    inventory,
    link_of,
    sriov_of,
)
from kvmpass.host.view.isolation import Bridge, Sibling, bridges_above, siblings
from kvmpass.host.view.watching import HostEvent, Uevent, watch_events

__all__ = [
    "Acs",
    "Ats",
    "BarInfo",
    "Bridge",
    "Capabilities",
    "Description",
    "DeviceStatus",
    "Express",
    "Filter",
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
    "Uevent",
    "bridges_above",
    "capabilities_of",
    "class_name",
    "describe",
    "device_status",
    "host_status",
    "inventory",
    "link_of",
    "parse_filter",
    "select",
    "siblings",
    "sriov_of",
    "watch_events",
]
