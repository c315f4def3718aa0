"""The guest's memory: whether the host has it, and whether this process may lock it."""

from __future__ import annotations

import re
import resource

from kvmpass.errors import NotEnoughMemory
from kvmpass.host.check import Check, Examined, Reading, Verdict, bad, good
from kvmpass.host.doctor.limits import raising
from kvmpass.host.limits import own_unit, rlimit
from kvmpass.host.problems import Problem, mib
from kvmpass.host.sysfs import Sysfs
from kvmpass.hugepages import POOLS, HugePagePool, pool_name

CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
NODES = "sys/devices/system/node"
_MOST_NODES = 1024  # include/linux/numa.h: MAX_NUMNODES

SHORT = Problem(
    kind="memory-short",
    brief="{available} of {size} available",
    cause="the guest needs {size} of memory, {available} are available on this host",
    remedy="give the guest less memory, or free some",
    error=NotEnoughMemory,
)
FEW_HUGE_PAGES = Problem(
    kind="huge-pages-short",
    brief="{free} of {size} free",
    cause="the guest needs {size} of {page} KiB pages, {free} of them are free",
    remedy="reserve more: write the number of pages to {pool}/nr_hugepages",
    commands=("echo {count} > {pool}/nr_hugepages",),
    error=NotEnoughMemory,
)
FEW_ON_NODES = Problem(
    kind="memory-nodes-short",
    brief="{available} of {size} on NUMA node {nodes}",
    cause="the guest needs {size} of memory, and this process may have memory of NUMA node {nodes} only, where "
    "{available} are available",
    remedy="give the guest less memory, or this process more nodes: for a systemd unit AllowedMemoryNodes=, "
    "cpuset.mems of its cgroups",
    error=NotEnoughMemory,
)
MEMLOCK = Problem(
    kind="memlock-low",
    brief="{limit} of {size}",
    cause="the guest's {size} must be locked in memory, this process may lock {limit}",
    remedy="raise the limit (for a systemd unit LimitMEMLOCK=, else ulimit -l {kib}, or memlock in limits.conf and "
    "a new login), or run as root",
    commands=("{command}",),
    error=NotEnoughMemory,
)


def _available(examined: Examined) -> Verdict:
    found = None
    for line in (examined.sysfs.text("proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) * 1024
    if examined.huge_page:
        return good("not needed: huge pages", Reading("/proc/meminfo", "not looked at"))
    if found is None:  # before Linux 3.14
        return good("the kernel does not tell", Reading("/proc/meminfo", "no MemAvailable"))
    read = Reading("/proc/meminfo", f"MemAvailable {mib(found)}")
    if found < examined.memory:
        return bad(SHORT, read, size=mib(examined.memory), available=mib(found))
    nodes, there = _on_nodes(examined)
    if there is not None and there < examined.memory:
        nearby = Reading("/proc/self/status", f"Mems_allowed_list {nodes}")
        return bad(FEW_ON_NODES, read, nearby, size=mib(examined.memory), available=mib(there), nodes=nodes)
    return good(f"{mib(found)} available, {mib(examined.memory)} wanted", read)


def _on_nodes(examined: Examined) -> tuple[str, int | None]:
    """The NUMA nodes of which this process may have memory, and how many bytes they have; None for all nodes."""
    allowed = examined.status.get("Mems_allowed_list", "")
    numbers = {
        number
        for part in allowed.split(",")
        if (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()))
        for number in range(int(match[1]), min(int(match[2] or match[1]), _MOST_NODES) + 1)
    }
    nodes = [name for name in examined.sysfs.names(NODES) if re.fullmatch(r"node\d+", name)]
    ours = [name for name in nodes if int(name.removeprefix("node")) in numbers]
    if not ours or len(ours) == len(nodes):
        return allowed, None
    total = 0
    for name in ours:
        for line in (examined.sysfs.text(NODES, name, "meminfo") or "").splitlines():
            match = re.search(r" (MemFree|Active\(file\)|Inactive\(file\)|SReclaimable): +(\d+) kB", line)
            total += int(match[2]) * 1024 if match else 0
    return allowed, total


def _huge_pages(examined: Examined) -> Verdict:
    sysfs, page = examined.sysfs, examined.huge_page
    if not page:
        pools = sysfs.names(POOLS)
        read = [Reading(f"/{POOLS}/{name}", _pool(sysfs, name)) for name in pools]
        return good("not asked for", *read)
    name = pool_name(page)
    base = f"{POOLS}/{name}"
    pool = HugePagePool.read(page, lambda file: sysfs.number(base, file) or 0)
    left = max(0, pool.available) * page
    read = [Reading(f"/{base}", _pool(sysfs, name) if sysfs.path(base).is_dir() else "not there")]
    if left < examined.memory:
        return bad(
            FEW_HUGE_PAGES,
            *read,
            size=mib(examined.memory),
            page=page >> 10,
            free=mib(left),
            pool=f"/{base}",
            count=pool.nr_for(examined.memory),
        )
    return good(f"{mib(left)} free, {mib(examined.memory)} wanted", *read)


def _pool(sysfs: Sysfs, name: str) -> str:
    return f"{sysfs.text(POOLS, name, 'free_hugepages')} of {sysfs.text(POOLS, name, 'nr_hugepages')} free"


def _memlock(examined: Examined) -> Verdict:
    capable = Reading("/proc/self/status", "CapEff with CAP_IPC_LOCK")
    if examined.capable(CAP_IPC_LOCK):
        return good("no limit: CAP_IPC_LOCK", capable)
    limit = rlimit(examined.sysfs, "Max locked memory").soft
    if examined.memlock is not None:
        limit = None if examined.memlock == resource.RLIM_INFINITY else examined.memlock
    text = "unlimited" if limit is None else mib(limit)
    read = Reading("/proc/self/limits", f"Max locked memory {text}"), Reading("/proc/self/status", "no CAP_IPC_LOCK")
    if limit is not None and limit < examined.locked:
        kib = -(-examined.locked // 1024)
        command = f"echo 'USER - memlock {kib}' > /etc/security/limits.d/50-kvmpass-USER.conf"
        if own_unit(examined.sysfs) is not None:
            command = raising(examined, "LimitMEMLOCK", "ulimit -l", examined.locked, 1024)
        return bad(MEMLOCK, *read, size=mib(examined.locked), limit=text, kib=kib, command=command)
    return good(text, *read)


MEMORY = Check(
    "memory",
    "Memory",
    "MemAvailable in `/proc/meminfo`; of its NUMA nodes, if not of all",
    (SHORT, FEW_ON_NODES),
    _available,
)
HUGE_PAGES = Check("huge-pages", "Huge pages", f"`/{POOLS}`, with `--hugepages`", (FEW_HUGE_PAGES,), _huge_pages)
LOCKED = Check(
    "memlock",
    "Locked memory",
    "Max locked memory in `/proc/self/limits`, which does not count with CAP_IPC_LOCK (`/proc/self/status`)",
    (MEMLOCK,),
    _memlock,
    ("access",),
)
CHECKS = (MEMORY, HUGE_PAGES, LOCKED)
