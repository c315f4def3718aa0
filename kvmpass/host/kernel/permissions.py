"""Whether this user may open a file, and whose it is."""

from __future__ import annotations

import os
import stat

from kvmpass.host.sysfs import Sysfs


def may(sysfs: Sysfs, node: str, mode: int = os.R_OK | os.W_OK) -> bool:
    """Return whether this process may open the file, by its effective user; ``mode`` is that of access(2)."""
    return sysfs.ask(f"may {mode} {node}", lambda: os.access(sysfs.path(node), mode, effective_ids=True))


def owner(sysfs: Sysfs, node: str) -> str:
    """Return the file's mode, user and group, or why they are unknown."""
    return sysfs.ask(f"owner {node}", lambda: _owner_now(sysfs, node))


def _owner_now(sysfs: Sysfs, node: str) -> str:
    try:
        found = sysfs.path(node).stat()
    except OSError as error:
        return error.strerror or "not found"
    return f"{stat.filemode(found.st_mode)}, user {found.st_uid}, group {found.st_gid}"
