"""Processes: who holds a device node, and whether a process of the past is still the same one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from kvmpass.host.sysfs import Sysfs

# They open each new node for an instant and let go when it vanishes.
_PASSERS_BY = frozenset({"systemd-udevd", "(udev-worker)", "udevd", "eudevd", "mdevd"})


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """A process by its id and the kernel's short name of it (``comm``, 15 characters)."""

    pid: int
    name: str

    def __str__(self) -> str:
        own = ", this very process" if self.pid == os.getpid() else ""
        return f"process {self.pid} ({self.name}){own}"


def process(sysfs: Sysfs, pid: int) -> Process:
    return Process(pid, sysfs.text("proc", str(pid), "comm") or "?")


def start_time(sysfs: Sysfs, pid: int) -> int | None:
    """When the process started, in clock ticks since boot (proc(5), stat field 22); None without process.

    A process that has exited and only waits for its parent counts as none: it holds nothing any more.
    """
    text = sysfs.text("proc", str(pid), "stat")
    if text is None or ")" not in text:
        return None
    fields = text.rpartition(")")[2].split()  # the name may hold blanks and parentheses
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def holders(sysfs: Sysfs, nodes: Iterable[str]) -> dict[str, list[Process]]:
    """Who has which of ``nodes`` (paths such as ``/dev/vfio/7``) open, as far as this user may look."""
    wanted = frozenset(nodes)
    found: dict[str, set[Process]] = {}
    if not wanted:
        return {}
    for name in sysfs.names("proc"):
        if not name.isdecimal():
            continue
        directory = sysfs.path("proc", name, "fd")
        for number in sysfs.names("proc", name, "fd"):
            try:
                target = os.readlink(f"{directory}/{number}")  # noqa: PTH115 - 100000 of them on a large host
            except OSError:
                continue
            if target in wanted:
                holder = process(sysfs, int(name))
                if holder.name not in _PASSERS_BY:
                    found.setdefault(target, set()).add(holder)
    return {node: sorted(who) for node, who in found.items()}
