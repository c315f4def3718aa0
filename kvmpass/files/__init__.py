"""Files of this host for a guest: a confined daemon serves them by vhost-user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.files.covered import VIRTUAL as VIRTUAL
    from kvmpass.files.covered import covers as covers
    from kvmpass.files.daemon import FileDaemon as FileDaemon
    from kvmpass.files.program import find_daemon as find_daemon
    from kvmpass.files.user import User as User
    from kvmpass.files.user import caller as caller
    from kvmpass.files.user import owner as owner

# What looks at a host asks only whether the program is installed.
__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.files.covered": ("VIRTUAL", "covers"),
        "kvmpass.files.daemon": ("FileDaemon",),
        "kvmpass.files.program": ("find_daemon",),
        "kvmpass.files.user": ("User", "caller", "owner"),
    },
)
