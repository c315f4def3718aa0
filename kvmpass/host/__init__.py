"""The host's own view: its PCI devices and IOMMU groups, what keeps a device from being assigned, how to borrow one
or to bind it for good.

The only part of the project that changes drivers.
"""

from kvmpass.host.address import Bdf
from kvmpass.host.anonymity import Anonymity
from kvmpass.host.blockers import blockers, check_assignable, is_harmless, users
from kvmpass.host.borrowing import Borrow, borrow
from kvmpass.host.capabilities import (
    Acs,
    Capabilities,
    Express,
    Msi,
    Msix,
    Power,
    Service,
    SriovRegisters,
    capabilities_of,
)
from kvmpass.host.classes import class_words
from kvmpass.host.description import BarInfo, Description, describe
from kvmpass.host.doctor import (
    CATALOGUE,
    Check,
    Finding,
    Outcome,
    Reading,
    check_host,
    check_limits,
    check_memory,
    diagnose,
    diagnose_device,
    interrupt_remapping,
)
from kvmpass.host.faults import EventParser, FaultLog, IommuEvent, open_fault_log
from kvmpass.host.filters import Filter, parse_filter, select
from kvmpass.host.handover import Handover, bind, unbind
from kvmpass.host.inventory import (
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
from kvmpass.host.isolation import Bridge, Sibling, bridges_above, siblings
from kvmpass.host.look import Look
from kvmpass.host.names import Names
from kvmpass.host.problems import Blocker, Problem
from kvmpass.host.processes import Process
from kvmpass.host.recorded import BadRecord, RecordedSysfs, open_recorded
from kvmpass.host.recording import Recorder, record
from kvmpass.host.restoring import Restored, restore
from kvmpass.host.steps import Step
from kvmpass.host.sysfs import IommuGroup, PciDevice, Resource, Sysfs
from kvmpass.host.watching import HostEvent, Uevent, watch_events

__all__ = [
    "CATALOGUE",
    "Acs",
    "Anonymity",
    "BadRecord",
    "BarInfo",
    "Bdf",
    "Blocker",
    "Borrow",
    "Bridge",
    "Capabilities",
    "Check",
    "Description",
    "DeviceStatus",
    "EventParser",
    "Express",
    "FaultLog",
    "Filter",
    "Finding",
    "Handover",
    "HostEvent",
    "HostStatus",
    "Inventory",
    "IommuEvent",
    "IommuGroup",
    "Link",
    "Look",
    "Msi",
    "Msix",
    "Names",
    "Outcome",
    "PciDevice",
    "Power",
    "Problem",
    "Process",
    "Reading",
    "RecordedSysfs",
    "Recorder",
    "Resource",
    "Restored",
    "Service",
    "Sibling",
    "Sriov",
    "SriovRegisters",
    "Step",
    "Sysfs",
    "Uevent",
    "bind",
    "blockers",
    "borrow",
    "bridges_above",
    "capabilities_of",
    "check_assignable",
    "check_host",
    "check_limits",
    "check_memory",
    "class_words",
    "describe",
    "device_status",
    "diagnose",
    "diagnose_device",
    "host_status",
    "interrupt_remapping",
    "inventory",
    "is_harmless",
    "link_of",
    "open_fault_log",
    "open_recorded",
    "parse_filter",
    "record",
    "restore",
    "select",
    "siblings",
    "sriov_of",
    "unbind",
    "users",
    "watch_events",
]
