"""The user as which a daemon serves files: never root."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping

from kvmpass._dataclass import dataclass

_NOBODY = 65534  # fs/posix_acl and user namespaces have it, too: overflowuid


@dataclass(frozen=True, slots=True)
class User:
    """A user and its group."""

    uid: int
    """The user ID, never 0."""
    gid: int
    """The group ID."""

    @property
    def name(self) -> str:
        """Its name; the user ID without one."""
        entry = _entry(self.uid)
        return entry.pw_name if entry else str(self.uid)

    @property
    def home(self) -> str | None:
        """Its home directory; None without one."""
        entry = _entry(self.uid)
        return entry.pw_dir if entry else None


def caller(environment: Mapping[str, str] = os.environ) -> User:
    """Return the user who runs kvmpass: this process's; under sudo the one who typed it; of root itself nobody."""
    if os.geteuid():
        return User(os.geteuid(), os.getegid())
    return sudo_caller(environment) or User(_NOBODY, _NOBODY)


def sudo_caller(environment: Mapping[str, str] = os.environ) -> User | None:
    """Return the user who has called sudo, for a process of root; None for any other process."""
    if os.geteuid():
        return None
    words = environment.get("SUDO_UID", ""), environment.get("SUDO_GID", "")
    if all(word.isdecimal() for word in words) and 0 < int(words[0]) < 1 << 32 and int(words[1]) < 1 << 32:
        return User(*map(int, words))
    return None


def owner(status: os.stat_result) -> User | None:
    """Return the user who owns a file, with that user's own group; None for root."""
    if not status.st_uid:
        return None
    entry = _entry(status.st_uid)
    return User(status.st_uid, entry.pw_gid if entry else _NOBODY)


def _entry(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None
