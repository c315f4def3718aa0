"""Files of this host for a guest: a confined daemon serves them by vhost-user."""

from kvmpass.files.covers import VIRTUAL, covers
from kvmpass.files.daemon import FileDaemon
from kvmpass.files.program import find_daemon
from kvmpass.files.user import User, caller, owner

__all__ = ["VIRTUAL", "FileDaemon", "User", "caller", "covers", "find_daemon", "owner"]
