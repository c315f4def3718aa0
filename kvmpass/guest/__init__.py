"""A Linux guest in a machine."""

from kvmpass.guest.extract import CopiedOut
from kvmpass.guest.guest import Guest, GuestResult
from kvmpass.guest.image import GuestImage, GuestSpec, prepare
from kvmpass.guest.output import OutputWriter, Sink

__all__ = [
    "CopiedOut",
    "Guest",
    "GuestImage",
    "GuestResult",
    "GuestSpec",
    "OutputWriter",
    "Sink",
    "prepare",
]
