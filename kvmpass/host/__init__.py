"""The host: its PCI devices and IOMMU groups, what blocks an assignment, and changes of drivers.

Packages: ``view``, ``blockers``, ``doctor``, ``usage``, ``drivers``, ``record``, ``kernel``.
"""

from kvmpass.host.address import Bdf
from kvmpass.host.blocker import Blocker, BlockerTemplate
from kvmpass.host.blockers import check_assignable
from kvmpass.host.doctor import diagnose
from kvmpass.host.drivers.bind import bind, unbind
from kvmpass.host.drivers.borrow import borrow
from kvmpass.host.drivers.restore import restore
from kvmpass.host.look import Look
from kvmpass.host.names import Names
from kvmpass.host.sysfs import IommuGroup, PciDevice, Resource, Sysfs
from kvmpass.host.view import describe, inventory, watch_events

__all__ = [
    "Bdf",
    "Blocker",
    "BlockerTemplate",
    "IommuGroup",
    "Look",
    "Names",
    "PciDevice",
    "Resource",
    "Sysfs",
    "bind",
    "borrow",
    "check_assignable",
    "describe",
    "diagnose",
    "inventory",
    "restore",
    "unbind",
    "watch_events",
]
