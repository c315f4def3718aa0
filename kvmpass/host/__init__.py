"""The host's own view: its PCI devices and IOMMU groups, what keeps a device from being assigned, how to borrow one.

The only part of the project that changes drivers.
"""

from kvmpass.host.address import Bdf
from kvmpass.host.borrowing import Borrow, Restored, borrow, restore
from kvmpass.host.checks import (
    Blocker,
    blockers,
    check_assignable,
    check_host,
    check_memory,
    interrupt_remapping,
)
from kvmpass.host.classes import class_words
from kvmpass.host.faults import DmaFault, FaultLog, open_fault_log
from kvmpass.host.filters import Filter, parse_filter, select
from kvmpass.host.journal import Step
from kvmpass.host.names import Names, name_of
from kvmpass.host.processes import OpenNodes, Process
from kvmpass.host.sysfs import IommuGroup, PciDevice, Resource, Sysfs

__all__ = [
    "Bdf",
    "Blocker",
    "Borrow",
    "DmaFault",
    "FaultLog",
    "Filter",
    "IommuGroup",
    "Names",
    "OpenNodes",
    "PciDevice",
    "Process",
    "Resource",
    "Restored",
    "Step",
    "Sysfs",
    "blockers",
    "borrow",
    "check_assignable",
    "check_host",
    "check_memory",
    "class_words",
    "interrupt_remapping",
    "name_of",
    "open_fault_log",
    "parse_filter",
    "restore",
    "select",
]
