"""A Linux guest in a machine."""

from kvmpass.guest.guest import Guest, GuestImage, GuestResult, GuestSpec, Pump, host_kernel, prepare

__all__ = [
    "Guest",
    "GuestImage",
    "GuestResult",
    "GuestSpec",
    "Pump",
    "host_kernel",
    "prepare",
]
