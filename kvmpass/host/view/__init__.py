"""PCI devices and IOMMU groups of this host, for display: inventory, description, filters, events."""

from kvmpass.host.view.capabilities import (
    Capabilities,
)
from kvmpass.host.view.classes import class_name
from kvmpass.host.view.description import BarInfo, Description, describe
from kvmpass.host.view.filters import select
from kvmpass.host.view.inventory import (
    DeviceStatus,
    HostStatus,
    Inventory,
    Link,
    Sriov,
    inventory,
    sriov_of,
)
from kvmpass.host.view.isolation import Bridge, Sibling, siblings
from kvmpass.host.view.watching import HostEvent, watch_events

__all__ = [
    "BarInfo",
    "Bridge",
    "Capabilities",
    "Description",
    "DeviceStatus",
    "HostEvent",
    "HostStatus",
    "Inventory",
    "Link",
    "Sibling",
    "Sriov",
    "class_name",
    "describe",
    "inventory",
    "select",
    "siblings",
    "sriov_of",
    "watch_events",
]
