"""A Linux guest in a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.guest.extract import CopiedOut as CopiedOut
    from kvmpass.guest.guest import Guest as Guest
    from kvmpass.guest.guest import GuestResult as GuestResult
    from kvmpass.guest.image import GuestImage as GuestImage
    from kvmpass.guest.image import prepare as prepare
    from kvmpass.guest.output import OutputWriter as OutputWriter
    from kvmpass.guest.output import Sink as Sink
    from kvmpass.guest.spec import GuestSpec as GuestSpec

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.guest.extract": ("CopiedOut",),
        "kvmpass.guest.guest": (
            "Guest",
            "GuestResult",
        ),
        "kvmpass.guest.image": (
            "GuestImage",
            "prepare",
        ),
        "kvmpass.guest.output": (
            "OutputWriter",
            "Sink",
        ),
        "kvmpass.guest.spec": ("GuestSpec",),
    },
)
