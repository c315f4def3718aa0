"""A virtual machine that devices can be assigned to."""

from kvmpass.machine.device import AssignedDevice, DeviceState
from kvmpass.machine.machine import Machine
from kvmpass.machine.vcpus import GuestOutcome

__all__ = [
    "AssignedDevice",
    "DeviceState",
    "GuestOutcome",
    "Machine",
]
