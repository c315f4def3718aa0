"""Processes: which of them have a device node open, and whether a PID still is the same process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

from kvmpass._dataclass import dataclass
from kvmpass.host.sysfs import Sysfs

# They open each new node for a moment, and close it when it is removed.
_PASSERS_BY = frozenset({"systemd-udevd", "(udev-worker)", "udevd", "eudevd", "mdevd"})


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """A process."""

    pid: int
    """Its PID."""
    name: str
    """Its name (``comm``, up to 15 characters)."""

    def __str__(self) -> str:
        own = ", this very process" if self.pid == os.getpid() else ""
        return f"process {self.pid} ({self.name}){own}"


def process(sysfs: Sysfs, pid: int) -> Process:
    """Return the process with its name; ``?`` if it has exited."""
    return Process(pid, sysfs.text("proc", str(pid), "comm") or "?")


def start_time(sysfs: Sysfs, pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot (proc(5), stat field 22); None without process.

    A zombie counts as none: it has no open files.
    """
    text = sysfs.text("proc", str(pid), "stat")
    if text is None or ")" not in text:
        return None
    fields = text.rpartition(")")[2].split()  # the name may hold blanks and parentheses
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


Holders = Callable[[Iterable[str]], dict[str, list[Process]]]
"""Returns the processes that have some nodes (paths such as ``/dev/vfio/7``) open, without nodes that none has."""


def holders(sysfs: Sysfs, nodes: Iterable[str]) -> dict[str, list[Process]]:
    """Return which processes have ``nodes`` (such as ``/dev/vfio/7``) open, as far as this user may inspect them."""
    wanted = frozenset(nodes)
    return _open_files(sysfs, wanted.__contains__) if wanted else {}


class OpenNodes:
    """The device nodes and sysfs files that all processes have open at one moment; a :data:`Holders`."""

    def __init__(self, sysfs: Sysfs) -> None:
        self._found = _open_files(sysfs, lambda target: target.startswith(("/dev/", "/sys/devices/")))
        self.in_sysfs = any(node.startswith("/sys/") for node in self._found)

    def __call__(self, nodes: Iterable[str]) -> dict[str, list[Process]]:
        """Return the processes that have each of ``nodes`` open."""
        return {node: self._found[node] for node in sorted(set(nodes)) if node in self._found}


def namespaces(sysfs: Sysfs, kind: str) -> dict[int, str]:
    """Return a process of each other namespace of a kind (``mnt``, ``net``), with the name (``net:[number]``).

    Only of namespaces that this user may inspect.
    """
    seen = {sysfs.link("proc/self/ns", kind)}
    found = {}
    for pid in pids(sysfs):
        namespace = sysfs.link("proc", str(pid), "ns", kind)
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            found[pid] = namespace
    return found


def sockets_of(sysfs: Sysfs, protocol: str) -> list[Process]:
    """Return the processes with sockets of a protocol (``AF_VSOCK``), as far as this user may inspect them.

    Only on this machine: it reads an attribute of each socket (net/socket.c: sockfs_xattr_get).
    """
    found = set()
    for pid, path, target in _descriptors(sysfs):
        with contextlib.suppress(OSError):
            socket = target.startswith("socket:")
            if socket and os.getxattr(path, "system.sockprotoname").rstrip(b"\0") == protocol.encode():
                found.add(process(sysfs, pid))
    return sorted(found)


def pids(sysfs: Sysfs) -> list[int]:
    """Return the PIDs of all processes."""
    return [int(name) for name in sysfs.names("proc") if name.isdecimal()]


def _descriptors(sysfs: Sysfs) -> Iterator[tuple[int, str, str]]:
    """Yield the PID, the link and its target for each open file of each process that this user may inspect."""
    for pid in pids(sysfs):
        directory = sysfs.place("proc", str(pid), "fd")
        for number in sysfs.names("proc", str(pid), "fd"):
            path = f"{directory}/{number}"
            try:
                yield pid, path, os.readlink(path)  # noqa: PTH115 - 100000 of them on a large host
            except OSError:
                continue


def _open_files(sysfs: Sysfs, wanted: Callable[[str], bool]) -> dict[str, list[Process]]:
    found: dict[str, set[Process]] = {}
    for pid, _, target in _descriptors(sysfs):
        if wanted(target):
            holder = process(sysfs, pid)
            if holder.name not in _PASSERS_BY or target.startswith("/dev/vfio/"):
                found.setdefault(target, set()).add(holder)
    return {node: sorted(who) for node, who in found.items()}
