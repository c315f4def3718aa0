"""kvmpass: PCI device assignment on AMD hosts, over KVM, VFIO and AMD-Vi.

The public names, each imported when it is first used: ``import kvmpass`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpass.assignment.plan import Plan, plan
    from kvmpass.dma.domain import Domain
    from kvmpass.errors import KvmpassError
    from kvmpass.guest import Guest, GuestSpec, prepare
    from kvmpass.host import Bdf, bind, borrow, restore, unbind
    from kvmpass.machine import AssignedDevice, Machine
    from kvmpass.machine.vcpus import GuestOutcome
    from kvmpass.memory import GuestMemory

_HOMES = {
    "AssignedDevice": "kvmpass.machine",
    "Bdf": "kvmpass.host",
    "Domain": "kvmpass.dma.domain",
    "GuestOutcome": "kvmpass.machine.vcpus",
    "Guest": "kvmpass.guest",
    "GuestMemory": "kvmpass.memory",
    "GuestSpec": "kvmpass.guest",
    "KvmpassError": "kvmpass.errors",
    "Machine": "kvmpass.machine",
    "bind": "kvmpass.host",
    "Plan": "kvmpass.assignment.plan",
    "borrow": "kvmpass.host",
    "plan": "kvmpass.assignment.plan",
    "prepare": "kvmpass.guest",
    "restore": "kvmpass.host",
    "unbind": "kvmpass.host",
}

__all__ = [
    "AssignedDevice",
    "Bdf",
    "Domain",
    "Guest",
    "GuestMemory",
    "GuestOutcome",
    "GuestSpec",
    "KvmpassError",
    "Machine",
    "Plan",
    "bind",
    "borrow",
    "plan",
    "prepare",
    "restore",
    "unbind",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
