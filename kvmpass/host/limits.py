"""Resource limits of this process (getrlimit(2)) and of its cgroups up to the root.

Read from ``/proc/self`` and ``/sys/fs/cgroup``, so that it works for recorded trees, too. Sources:
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, hugetlb.rst, pids.rst; mm/memcontrol.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from kvmpass._dataclass import dataclass
from kvmpass.host.kernel.mounts import mounts_of
from kvmpass.host.kernel.processes import pids
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs

_LIMITS = "proc/self/limits"
_NEVER = 1 << 62  # version 1 writes "no limit" as the largest multiple of a page
_UNITS = (".service", ".scope", ".slice")


@dataclass(frozen=True, slots=True)
class Rlimit:
    """A resource limit, in the kernel's unit (bytes, descriptors …)."""

    soft: int | None
    """The soft limit; None: unlimited."""
    hard: int | None
    """The hard limit; None: unlimited."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One control group of this process."""

    directory: str
    """Its directory, without a leading slash."""
    version: int
    """1 or 2."""

    @property
    def unit(self) -> str | None:
        """The systemd unit that it is: a service, a scope or a slice; None for any other."""
        name = self.directory.rpartition("/")[2]
        return name if name.endswith(_UNITS) else None

    @property
    def is_users(self) -> bool:
        """Whether it belongs to a user's systemd instance."""
        above = self.directory.split("/")[:-1]
        return any(part.startswith("user@") and part.endswith(".service") for part in above)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One limit of a cgroup."""

    cgroup: Cgroup
    """The cgroup."""
    file: str
    """The file of the limit in the cgroup's directory."""
    limit: int
    """The limit: bytes, or tasks."""
    used: int
    """The usage."""
    reclaimable: int = 0
    """The part of ``used`` that the kernel can reclaim."""

    @property
    def left(self) -> int:
        """What is left below the limit."""
        return max(0, self.limit - max(0, self.used - self.reclaimable))

    @property
    def path(self) -> str:
        """The file of the limit, with a leading slash."""
        return f"/{self.cgroup.directory}/{self.file}"


def rlimit(look: Look, name: str) -> Rlimit:
    """Return one line of ``/proc/self/limits``, such as ``Max locked memory``; unlimited without it."""
    for line in (look.text(_LIMITS) or "").splitlines():
        if line.startswith(f"{name} "):
            words = [*line.removeprefix(name).split(), "", ""]
            return Rlimit(*(int(word) if word.isdecimal() else None for word in words[:2]))
    return Rlimit(None, None)


def cgroups(sysfs: Sysfs, controller: str) -> list[Cgroup]:
    """Return this process's cgroups with ``controller`` (``memory``, ``pids`` …), innermost first, up to the root.

    In a container, those above its root are not visible.
    """
    paths = {}
    for line in sysfs.lines("proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) == 3:
            for name in parts[1].split(","):
                paths[name] = parts[2]
    found = []
    for mount in mounts_of(sysfs, "self"):
        own = paths.get(controller) if mount.kind == "cgroup" and controller in mount.options.split(",") else None
        if mount.kind == "cgroup2":
            own = paths.get("")
        if own is None:
            continue
        root, place = mount.root, mount.point
        inside = own.removeprefix(root.rstrip("/")) if own == root or own.startswith(root.rstrip("/") + "/") else ""
        if ".." in inside.split("/"):  # outside of the visible hierarchy
            inside = ""
        innermost = PurePosixPath(f"{place}{inside}".strip("/"))
        for directory in map(str, (innermost, *innermost.parents)):
            if directory.startswith(place.strip("/")) and sysfs.exists(directory):
                found.append(Cgroup(directory, 2 if mount.kind == "cgroup2" else 1))
    return list(dict.fromkeys(found))


def _number(sysfs: Sysfs, *parts: str) -> int | None:
    text = sysfs.text(*parts)
    if text is None or not text.isdecimal():  # "max"
        return None
    value = int(text)
    return None if value >= _NEVER else value


def _ceiling(sysfs: Sysfs, cgroup: Cgroup, limit: str, used: str, reclaimable: int = 0) -> Iterator[Ceiling]:
    most = _number(sysfs, cgroup.directory, limit)
    if most is not None:
        yield Ceiling(cgroup, limit, most, _number(sysfs, cgroup.directory, used) or 0, reclaimable)


def memory_ceilings(sysfs: Sysfs) -> list[Ceiling]:
    """Return limits of memory in bytes: above, the kernel kills (``memory.max``) or throttles (``memory.high``).

    Swap does not help: a guest's memory is pinned. In version 1 ``memory.memsw`` includes swap.
    """
    found: list[Ceiling] = []
    for cgroup in cgroups(sysfs, "memory"):
        cache = _file_cache(sysfs, cgroup)
        if cgroup.version == 2:
            for limit in ("memory.max", "memory.high"):
                found += _ceiling(sysfs, cgroup, limit, "memory.current", cache)
        else:
            for name in ("memory", "memory.memsw"):
                found += _ceiling(sysfs, cgroup, f"{name}.limit_in_bytes", f"{name}.usage_in_bytes", cache)
    return found


def _file_cache(sysfs: Sysfs, cgroup: Cgroup) -> int:
    """Bytes of page cache, which the kernel reclaims before it kills."""
    prefix = "" if cgroup.version == 2 else "total_"  # with what is below it
    found = sysfs.fields(cgroup.directory, "memory.stat", separator=" ")
    values = [found.get(f"{prefix}{name}", "") for name in ("active_file", "inactive_file", "slab_reclaimable")]
    return sum(int(value) for value in values if value.isdecimal())


def huge_page_ceilings(sysfs: Sysfs, page: int) -> list[Ceiling]:
    """Return limits in bytes for huge pages of ``page`` bytes: an access above is a SIGBUS."""
    size = f"{page >> 30}GB" if page >= 1 << 30 else f"{page >> 20}MB"
    found: list[Ceiling] = []
    for cgroup in cgroups(sysfs, "hugetlb"):
        base = f"hugetlb.{size}"
        if cgroup.version == 2:
            found += _ceiling(sysfs, cgroup, f"{base}.max", f"{base}.current")
            found += _ceiling(sysfs, cgroup, f"{base}.rsvd.max", f"{base}.rsvd.current")
        else:
            found += _ceiling(sysfs, cgroup, f"{base}.limit_in_bytes", f"{base}.usage_in_bytes")
            found += _ceiling(sysfs, cgroup, f"{base}.rsvd.limit_in_bytes", f"{base}.rsvd.usage_in_bytes")
    return found


def counts_huge_pages(sysfs: Sysfs) -> bool:
    """Return whether huge pages count as memory, too (Linux 6.7, option ``memory_hugetlb_accounting``)."""
    mounts = [mount for mount in mounts_of(sysfs, "self") if mount.kind == "cgroup2"]
    return any("memory_hugetlb_accounting" in mount.options.split(",") for mount in mounts)


def task_ceilings(sysfs: Sysfs) -> list[Ceiling]:
    """Return limits of processes and threads."""
    found: list[Ceiling] = []
    for cgroup in cgroups(sysfs, "pids"):
        found += _ceiling(sysfs, cgroup, "pids.max", "pids.current")
    return found


def own_unit(sysfs: Sysfs) -> Cgroup | None:
    """Return the systemd service that this process runs in; None for a login session or any other scope."""
    for controller in ("", "memory", "pids", "name=systemd"):
        for cgroup in cgroups(sysfs, controller):
            unit = cgroup.unit or ""
            if unit.endswith(".service") and not unit.startswith("user@"):
                return cgroup
            if unit.endswith(".scope"):  # of a session, a container, systemd-run --scope: none has Limit…=
                return None
    return None


def tasks_of_user(sysfs: Sysfs, uid: int) -> int:
    """Return the number of threads of all processes with the real user ID ``uid``, as RLIMIT_NPROC counts."""
    total = 0
    for pid in pids(sysfs):
        fields = sysfs.fields("proc", str(pid), "status")
        if fields.get("Uid", "").split()[:1] == [str(uid)]:
            threads = fields.get("Threads", "1")
            total += int(threads) if threads.isdecimal() else 1
    return total


def needed_besides(ordinary: int) -> int:
    """Return the maximum size in bytes of what a guest with so many bytes of ordinary pages needs besides them.

    Page tables, and 160 MiB for copies of kernel and initramfs, and for decompressing the kernel (Debian's takes 101
    in the first run); not the files that are to be copied into the guest.
    """
    return page_tables(ordinary) + (160 << 20)


def page_tables(memory: int) -> int:
    """Return the maximum size in bytes of the page tables of KVM and IOMMU for a guest of ``memory`` bytes.

    With 4 KiB pages 1/512 each, and the upper levels.
    """
    return memory // 128


def threads_needed(look: Look, cpus: int) -> int:
    """Return the maximum number of concurrent threads and processes of an assignment.

    vCPUs; threads that populate memory, one for each host CPU; those for device events, interrupts and the guest's
    output, the main thread, helpers that write to sysfs or load modules.
    """
    host = (look.text("proc/cpuinfo") or "").count("\nprocessor") + 1
    return cpus + host + 8


# Standard input, output and error; KVM, the VM, its VFIO device; the container; epoll and eventfd of the watch over
# devices; the kernel's log.
_MACHINE_DESCRIPTORS = 3 + 3 + 1 + 2 + 1
# The console of a guest's commands: its thread's epoll and eventfd; eventfds of its port's two queues, and of its two
# vectors.
CONSOLE_DESCRIPTORS = 2 + 2 + 2
# A device; the eventfds of its ERR and REQ interrupts; those of INTx, raised and ended.
_DEVICE_DESCRIPTORS = 1 + 2 + 2
# A daemon that serves files: its connection, control socket and messages; epoll and eventfd of the watch over it,
# and of what signals it; the eventfd of vectors that are off; eventfds of two queues; of three vectors.
_DAEMON_DESCRIPTORS = 3 + 2 + 2 + 1 + 2 + 3


def descriptors_needed(devices: int, groups: int, cpus: int, daemons: int = 0, memfds: int = 0) -> int:
    """Return the number of file descriptors of a guest with these devices before it unmasks one of their vectors.

    ``daemons``: those that serve it files; ``memfds``: regions of its memory that are memfds.
    """
    fixed = _MACHINE_DESCRIPTORS + CONSOLE_DESCRIPTORS + cpus + groups + memfds
    return fixed + _DEVICE_DESCRIPTORS * devices + _DAEMON_DESCRIPTORS * daemons
