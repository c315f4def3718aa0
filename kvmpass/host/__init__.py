"""The host's own view: its PCI devices and IOMMU groups, what keeps a device from being assigned, how to borrow one.

The only part of the project that changes drivers.
"""

from kvmpass.host.address import Bdf
from kvmpass.host.borrowing import Borrow, Restored, borrow, restore
from kvmpass.host.checks import blockers, check_assignable, is_harmless
from kvmpass.host.doctor import (
    CATALOGUE,
    Check,
    Finding,
    Outcome,
    Reading,
    check_host,
    check_memory,
    diagnose,
    interrupt_remapping,
)
from kvmpass.host.faults import DmaFault, FaultLog, open_fault_log
from kvmpass.host.journal import Step
from kvmpass.host.names import device_name, name_of
from kvmpass.host.problems import Blocker, Problem
from kvmpass.host.processes import OpenNodes, Process
from kvmpass.host.sysfs import IommuGroup, PciDevice, Resource, Sysfs

__all__ = [
    "CATALOGUE",
    "Bdf",
    "Blocker",
    "Borrow",
    "Check",
    "DmaFault",
    "FaultLog",
    "Finding",
    "IommuGroup",
    "OpenNodes",
    "Outcome",
    "PciDevice",
    "Problem",
    "Process",
    "Reading",
    "Resource",
    "Restored",
    "Step",
    "Sysfs",
    "blockers",
    "borrow",
    "check_assignable",
    "check_host",
    "check_memory",
    "device_name",
    "diagnose",
    "interrupt_remapping",
    "is_harmless",
    "name_of",
    "open_fault_log",
    "restore",
]
