"""What is mounted, in every mount namespace that this user may look into (proc(5), /proc/PID/mountinfo)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvmpass.host.kernel.processes import namespaces, process
from kvmpass.host.sysfs import Sysfs


@dataclass(frozen=True, slots=True)
class Mount:
    """``number`` is ``major:minor`` of the device, made up by the kernel for file systems without one.

    ``options`` are those of the file system (comma-separated). ``where`` is empty in this process's own namespace,
    else words that name another one.
    """

    number: str
    point: str
    kind: str
    source: str
    options: str
    where: str = ""


def mounts(sysfs: Sysfs) -> list[Mount]:
    """Those of this process first, then what only others have: one of each device and source."""
    found = list(_read(sysfs, "self", ""))
    known = {(one.number, one.source) for one in found}
    for pid in namespaces(sysfs, "mnt"):
        for mount in _read(sysfs, str(pid), f" for {process(sysfs, pid)}"):
            if (mount.number, mount.source) not in known:
                known.add((mount.number, mount.source))
                found.append(mount)
    return found


def _read(sysfs: Sysfs, pid: str, where: str) -> Iterator[Mount]:
    for line in (sysfs.text("proc", pid, "mountinfo") or "").splitlines():
        fields = line.split(" ")
        try:
            rest = fields.index("-", 6)
            kind, source = fields[rest + 1], _unescape(fields[rest + 2])
            options = fields[rest + 3] if len(fields) > rest + 3 else ""
            yield Mount(fields[2], _unescape(fields[4]), kind, source, options, where)
        except (ValueError, IndexError):
            continue


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
