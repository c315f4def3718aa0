"""What of this host no guest sees, in whatever tree it is: the kernel's own file systems."""

from __future__ import annotations

from collections.abc import Iterable

KERNELS_OWN = ("/dev", "/proc", "/run", "/sys")
"""Directories of the root, covered whatever is in them; /run has the sockets of services."""
_TYPES = """
    autofs binder binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts devtmpfs efivarfs fusectl hugetlbfs
    mqueue nfsd nsfs proc pstore resctrl rpc_pipefs securityfs selinuxfs sysfs tracefs
"""
VIRTUAL = frozenset(_TYPES.split())
"""Types of file systems that hold the kernel's objects, not files."""


def covers(source: str, mounts: Iterable[tuple[str, str]]) -> list[str]:
    """Return the directories and files below ``source`` to cover, as paths in it, each after those that it is below.

    ``source``: an absolute path without symlinks. ``mounts``: mount points of this host with their types.
    """
    prefix = source.rstrip("/")
    found = {point.removeprefix(prefix) for point, kind in mounts if kind in VIRTUAL and _below(point, prefix)}
    return sorted({*found, *(KERNELS_OWN if not prefix else ())} - {"", "/"})


def _below(point: str, prefix: str) -> bool:
    return point.startswith(f"{prefix}/")
