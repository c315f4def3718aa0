"""Mounts in every mount namespace that this user may inspect (proc(5), /proc/PID/mountinfo)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvmpass._dataclass import dataclass
from kvmpass.host.kernel.processes import namespaces, process
from kvmpass.host.sysfs import Sysfs


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount."""

    number: str
    """``major:minor`` of the device; an anonymous number for a file system without one."""
    root: str
    """The directory of the file system that is mounted."""
    point: str
    """The mount point."""
    kind: str
    """The file system type."""
    source: str
    """The source, such as a device node."""
    options: str
    """Options of the file system, separated by commas."""
    where: str = ""
    """The mount namespace, as a suffix for messages; empty for this process's own."""


def mounts(sysfs: Sysfs) -> list[Mount]:
    """Return the mounts of this process first, then those only in other namespaces: one of each device and source."""
    found = list(mounts_of(sysfs, "self"))
    known = {(mount.number, mount.source) for mount in found}
    for pid in namespaces(sysfs, "mnt"):
        for mount in mounts_of(sysfs, str(pid), f" for {process(sysfs, pid)}"):
            if (mount.number, mount.source) not in known:
                known.add((mount.number, mount.source))
                found.append(mount)
    return found


def mounts_of(sysfs: Sysfs, pid: str, where: str = "") -> Iterator[Mount]:
    """Yield the mounts of a process, ``pid`` or ``self``; ``where`` is that of :class:`Mount`."""
    for line in sysfs.lines("proc", pid, "mountinfo"):
        fields = line.split(" ")
        try:
            rest = fields.index("-", 6)
            kind, source = fields[rest + 1], _unescape(fields[rest + 2])
            options = fields[rest + 3] if len(fields) > rest + 3 else ""
            yield Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), kind, source, options, where)
        except (ValueError, IndexError):
            continue


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
