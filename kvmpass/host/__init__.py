"""The host: its PCI devices and IOMMU groups, what blocks an assignment, and changes of drivers.

Packages: ``view``, ``blockers``, ``doctor``, ``usage``, ``drivers``, ``record``, ``kernel``.

The public names, each imported when it is first used: a command loads the packages that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.host.address import Bdf as Bdf
    from kvmpass.host.blocker import Blocker as Blocker
    from kvmpass.host.blocker import BlockerTemplate as BlockerTemplate
    from kvmpass.host.blockers import check_assignable as check_assignable
    from kvmpass.host.doctor import diagnose as diagnose
    from kvmpass.host.drivers.bind import bind as bind
    from kvmpass.host.drivers.bind import unbind as unbind
    from kvmpass.host.drivers.borrow import borrow as borrow
    from kvmpass.host.drivers.restore import restore as restore
    from kvmpass.host.look import Look as Look
    from kvmpass.host.names import Names as Names
    from kvmpass.host.sysfs import IommuGroup as IommuGroup
    from kvmpass.host.sysfs import PciDevice as PciDevice
    from kvmpass.host.sysfs import Resource as Resource
    from kvmpass.host.sysfs import Sysfs as Sysfs
    from kvmpass.host.view.description import describe as describe
    from kvmpass.host.view.inventory import inventory as inventory
    from kvmpass.host.view.watching import watch_events as watch_events

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.host.address": ("Bdf",),
        "kvmpass.host.blocker": ("Blocker", "BlockerTemplate"),
        "kvmpass.host.blockers": ("check_assignable",),
        "kvmpass.host.doctor": ("diagnose",),
        "kvmpass.host.drivers.bind": ("bind", "unbind"),
        "kvmpass.host.drivers.borrow": ("borrow",),
        "kvmpass.host.drivers.restore": ("restore",),
        "kvmpass.host.look": ("Look",),
        "kvmpass.host.names": ("Names",),
        "kvmpass.host.sysfs": ("IommuGroup", "PciDevice", "Resource", "Sysfs"),
        "kvmpass.host.view.description": ("describe",),
        "kvmpass.host.view.inventory": ("inventory",),
        "kvmpass.host.view.watching": ("watch_events",),
    },
)
