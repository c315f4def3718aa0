"""Guests that stay, and what is run in them: :func:`start` boots one, whose :class:`Session` runs commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.session.opening import open_session as open_session
    from kvmpass.session.opening import start as start
    from kvmpass.session.process import GuestProcess as GuestProcess
    from kvmpass.session.session import Session as Session

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.session.opening": ("open_session", "start"),
        "kvmpass.session.process": ("GuestProcess",),
        "kvmpass.session.session": ("Session",),
    },
)
