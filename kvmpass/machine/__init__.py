"""A virtual machine that devices can be assigned to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.machine.device import AssignedDevice as AssignedDevice
    from kvmpass.machine.device import DeviceState as DeviceState
    from kvmpass.machine.machine import Machine as Machine
    from kvmpass.machine.vcpus import GuestOutcome as GuestOutcome

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.machine.device": (
            "AssignedDevice",
            "DeviceState",
        ),
        "kvmpass.machine.machine": ("Machine",),
        "kvmpass.machine.vcpus": ("GuestOutcome",),
    },
)
