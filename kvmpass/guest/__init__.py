"""A Linux guest in a machine."""

from kvmpass.guest.guest import Guest, GuestResult
from kvmpass.guest.image import GuestImage, GuestSpec, host_kernel, prepare
from kvmpass.guest.output import Pump, Sink

__all__ = [
    "Guest",
    "GuestImage",
    "GuestResult",
    "GuestSpec",
    "Pump",
    "Sink",
    "host_kernel",
    "prepare",
]
