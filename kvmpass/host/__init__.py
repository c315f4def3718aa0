"""The host's own view: its PCI devices and IOMMU groups, what keeps a device from being assigned, how to borrow one
or to bind it for good.

The only part of the project that changes drivers.
"""

from kvmpass.host.address import Bdf
from kvmpass.host.borrowing import Borrow, borrow
from kvmpass.host.checks import (
    Blocker,
    blockers,
    check_assignable,
    check_host,
    check_memory,
    interrupt_remapping,
    users,
)
from kvmpass.host.faults import DmaFault, FaultLog, open_fault_log
from kvmpass.host.handover import Handover, bind, unbind
from kvmpass.host.names import name_of
from kvmpass.host.processes import OpenNodes, Process
from kvmpass.host.restoring import Restored, restore
from kvmpass.host.steps import Step
from kvmpass.host.sysfs import IommuGroup, PciDevice, Resource, Sysfs

__all__ = [
    "Bdf",
    "Blocker",
    "Borrow",
    "DmaFault",
    "FaultLog",
    "Handover",
    "IommuGroup",
    "OpenNodes",
    "PciDevice",
    "Process",
    "Resource",
    "Restored",
    "Step",
    "Sysfs",
    "bind",
    "blockers",
    "borrow",
    "check_assignable",
    "check_host",
    "check_memory",
    "interrupt_remapping",
    "name_of",
    "open_fault_log",
    "restore",
    "unbind",
    "users",
]
