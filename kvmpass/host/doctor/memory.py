"""The guest's memory: whether the host has enough, and whether this process may lock it."""

from __future__ import annotations

import re

from kvmpass.errors import NotEnoughMemory
from kvmpass.host.blocker import BlockerTemplate, mib
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.doctor.limits import overhead, raising
from kvmpass.host.limits import own_unit, rlimit
from kvmpass.host.sysfs import Sysfs
from kvmpass.hugepages import POOLS, HugePagePool, pool_name
from kvmpass.numa import NODES, split_nodes

CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h

SHORT = BlockerTemplate(
    kind="memory-short",
    brief="{available} of {size} available",
    cause="the guest needs {size} of memory, with page tables and copies of files; {available} are available on this "
    "host",
    remedy="give the guest less memory, or free some",
    error=NotEnoughMemory,
)
FEW_HUGE_PAGES = BlockerTemplate(
    kind="huge-pages-short",
    brief="{free} of {size} free",
    cause="the guest needs {size} of {page} KiB pages, {free} of them are free",
    remedy="reserve more: write the number of pages to {pool}/nr_hugepages",
    commands=("echo {count} > {pool}/nr_hugepages",),
    error=NotEnoughMemory,
)
FEW_HUGE_ON_NODES = BlockerTemplate(
    kind="huge-pages-nodes-short",
    brief="{free} of {size} free on allowed nodes {nodes}",
    cause="the guest needs {size} of {page} KiB pages, {free} of them are free on the NUMA nodes that this process "
    "may use: {nodes}",
    remedy="reserve more there: write the number of pages to {pool}/nr_hugepages; or give this process more nodes: "
    "for a systemd unit AllowedMemoryNodes=, cpuset.mems of its cgroups",
    commands=("echo {count} > {pool}/nr_hugepages",),
    error=NotEnoughMemory,
)
FEW_ON_NODES = BlockerTemplate(
    kind="memory-nodes-short",
    brief="{available} of {size} on allowed nodes {nodes}",
    cause="the guest needs {size} of memory, with page tables and copies of files; {available} are available on the "
    "NUMA nodes that this process may use: {nodes}",
    remedy="give the guest less memory, or this process more nodes: for a systemd unit AllowedMemoryNodes=, "
    "cpuset.mems of its cgroups",
    error=NotEnoughMemory,
)
MEMLOCK = BlockerTemplate(
    kind="memlock-low",
    brief="{limit} of {size}",
    cause="the guest's {size} must be locked in memory, this process may lock {limit}",
    remedy="raise the limit (for a systemd unit LimitMEMLOCK=, else ulimit -l {kib}, or memlock in limits.conf and "
    "a new login), or run as root",
    commands=("{command}",),
    error=NotEnoughMemory,
)


@precondition(
    "memory",
    "Memory",
    "MemAvailable in `/proc/meminfo`; that of the allowed NUMA nodes, if not all",
    (SHORT, FEW_ON_NODES),
)
def _available(context: CheckContext) -> Verdict:
    wanted = (0 if context.huge_page else context.memory) + overhead(context)
    available = context.look.fields("proc/meminfo").get("MemAvailable")
    if available is None:  # before Linux 3.14
        return passed("unknown", Reading("/proc/meminfo", "no MemAvailable"))
    found = int(available.split()[0]) * 1024
    read = Reading("/proc/meminfo", f"MemAvailable {mib(found)}")
    if found < wanted:
        return failed(SHORT, read, size=mib(wanted), available=mib(found))
    nodes, nearby = _on_nodes(context)
    if nearby is not None and nearby < wanted:
        return failed(FEW_ON_NODES, read, _allowed(context), size=mib(wanted), available=mib(nearby), nodes=nodes)
    return passed(f"{mib(found)} available, {mib(wanted)} wanted", read)


def _on_nodes(context: CheckContext) -> tuple[str, int | None]:
    """Return the NUMA nodes that this process may use, and their available bytes; None if it may use all nodes."""
    ours, others = _nodes(context)
    nodes = ", ".join(map(str, ours))
    if not others:
        return nodes, None
    available = 0
    for node in ours:
        for line in context.sysfs.lines(NODES, f"node{node}", "meminfo"):
            match = re.search(r" (MemFree|Active\(file\)|Inactive\(file\)|SReclaimable): +(\d+) kB", line)
            available += int(match[2]) * 1024 if match else 0
    return nodes, available


def _allowed(context: CheckContext) -> Reading:
    return Reading("/proc/self/status", f"Mems_allowed_list {context.status.get('Mems_allowed_list', '')}")


def _nodes(context: CheckContext) -> tuple[list[int], list[int]]:
    """Return the NUMA nodes that this process may use, and the others."""
    memory = context.look.text(f"{NODES}/has_memory") or ""
    return split_nodes(context.sysfs.names(NODES), memory, context.status.get("Mems_allowed_list", ""))


@precondition(
    "huge-pages",
    "Huge pages",
    f"`/{POOLS}`, with `--hugepages`; `/{NODES}`, if this process may not use all NUMA nodes",
    (FEW_HUGE_PAGES, FEW_HUGE_ON_NODES),
)
def _huge_pages(context: CheckContext) -> Verdict:
    sysfs, page = context.sysfs, context.huge_page
    if not page:
        pools = sysfs.names(POOLS)
        read = [Reading(f"/{POOLS}/{name}", _pool(sysfs, name)) for name in pools]
        return passed("not requested", *read)
    name = pool_name(page)
    base = f"{POOLS}/{name}"
    ours, others = _nodes(context)
    pool = HugePagePool.read(page, sysfs.number, (ours, others))
    left = max(0, pool.available) * page
    read = [Reading(f"/{base}", _pool(sysfs, name) if sysfs.path(base).is_dir() else "not found")]
    if left < context.memory and others:
        return failed(
            FEW_HUGE_ON_NODES,
            *read,
            _allowed(context),
            size=mib(context.memory),
            page=page >> 10,
            free=mib(left),
            nodes=", ".join(map(str, ours)),
            pool=f"/{pool.place}",
            count=pool.nr_for(context.memory),
        )
    if left < context.memory:
        return failed(
            FEW_HUGE_PAGES,
            *read,
            size=mib(context.memory),
            page=page >> 10,
            free=mib(left),
            pool=f"/{pool.place}",
            count=pool.nr_for(context.memory),
        )
    return passed(f"{mib(left)} free, {mib(context.memory)} wanted", *read)


def _pool(sysfs: Sysfs, name: str) -> str:
    return f"{sysfs.text(POOLS, name, 'free_hugepages')} of {sysfs.text(POOLS, name, 'nr_hugepages')} free"


@precondition(
    "memlock",
    "Locked memory",
    "Max locked memory in `/proc/self/limits`, which has no effect with CAP_IPC_LOCK (`/proc/self/status`)",
    (MEMLOCK,),
    needs=("access",),
)
def _memlock(context: CheckContext) -> Verdict:
    capable = Reading("/proc/self/status", "CapEff with CAP_IPC_LOCK")
    if context.capable(CAP_IPC_LOCK):
        return passed("no limit: CAP_IPC_LOCK", capable)
    limit = rlimit(context.look, "Max locked memory").soft
    text = "unlimited" if limit is None else mib(limit)
    read = Reading("/proc/self/limits", f"Max locked memory {text}"), Reading("/proc/self/status", "no CAP_IPC_LOCK")
    if limit is not None and limit < context.to_lock:
        kib = -(-context.to_lock // 1024)
        command = f"echo 'USER - memlock {kib}' > /etc/security/limits.d/50-kvmpass-USER.conf"
        if own_unit(context.sysfs) is not None:
            command = raising(context, "LimitMEMLOCK", "ulimit -l", context.to_lock, 1024)
        return failed(MEMLOCK, *read, size=mib(context.to_lock), limit=text, kib=kib, command=command)
    return passed(text, *read)


CHECKS = (_available, _huge_pages, _memlock)
