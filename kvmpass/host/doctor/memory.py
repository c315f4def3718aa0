"""The guest's memory: whether the host has it, and whether this process may lock it."""

from __future__ import annotations

import resource

from kvmpass.errors import NotEnoughMemory
from kvmpass.host.check import Check, Examined, Reading, Verdict, bad, good
from kvmpass.host.problems import Problem
from kvmpass.host.sysfs import Sysfs
from kvmpass.layout import MIB

CAP_IPC_LOCK = 14  # include/uapi/linux/capability.h
POOLS = "sys/kernel/mm/hugepages"

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
MEMLOCK = Problem(
    kind="memlock-low",
    brief="{limit} of {size}",
    cause="the guest's {size} must be locked in memory, this process may lock {limit}",
    remedy="raise the limit (ulimit -l {kib}, or memlock in limits.conf), or run as root; for a user: this line, and "
    "a new login",
    commands=("echo 'USER - memlock {kib}' > /etc/security/limits.d/50-kvmpass-USER.conf",),
    error=NotEnoughMemory,
)


def _mib(size: int) -> str:
    return f"{size // MIB} MiB"


def _available(examined: Examined) -> Verdict:
    found = None
    for line in (examined.sysfs.text("proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) * 1024
    if examined.huge_page:
        return good("not needed: huge pages", Reading("/proc/meminfo", "not looked at"))
    if found is None:  # before Linux 3.14
        return good("the kernel does not tell", Reading("/proc/meminfo", "no MemAvailable"))
    read = Reading("/proc/meminfo", f"MemAvailable {_mib(found)}")
    if found < examined.memory:
        return bad(SHORT, read, size=_mib(examined.memory), available=_mib(found))
    return good(f"{_mib(found)} available, {_mib(examined.memory)} wanted", read)


def _huge_pages(examined: Examined) -> Verdict:
    sysfs, page = examined.sysfs, examined.huge_page
    if not page:
        pools = sysfs.names(POOLS)
        read = [Reading(f"/{POOLS}/{name}", _pool(sysfs, name)) for name in pools]
        return good("not asked for", *read)
    name = f"hugepages-{page >> 10}kB"
    base = f"{POOLS}/{name}"
    counts = ("free", "resv", "nr", "nr_overcommit", "surplus")
    free, reserved, total, most, surplus = (sysfs.number(base, f"{count}_hugepages") or 0 for count in counts)
    left = max(0, free - reserved + max(0, most - surplus)) * page
    read = [Reading(f"/{base}", _pool(sysfs, name) if sysfs.path(base).is_dir() else "not there")]
    if left < examined.memory:
        missing = -(-(examined.memory - left) // page)
        return bad(
            FEW_HUGE_PAGES,
            *read,
            size=_mib(examined.memory),
            page=page >> 10,
            free=_mib(left),
            pool=f"/{base}",
            count=total + missing,
        )
    return good(f"{_mib(left)} free, {_mib(examined.memory)} wanted", *read)


def _pool(sysfs: Sysfs, name: str) -> str:
    return f"{sysfs.text(POOLS, name, 'free_hugepages')} of {sysfs.text(POOLS, name, 'nr_hugepages')} free"


def _capable(sysfs: Sysfs, capability: int) -> bool:
    for line in (sysfs.text("proc/self/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def memlock_limit(sysfs: Sysfs) -> int:
    """RLIMIT_MEMLOCK of this process in bytes, -1 without limit."""
    for line in (sysfs.text("proc/self/limits") or "").splitlines():
        if line.startswith("Max locked memory"):
            soft = line.removeprefix("Max locked memory").split()[0]
            return resource.RLIM_INFINITY if soft == "unlimited" else int(soft)
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def _memlock(examined: Examined) -> Verdict:
    capable = Reading("/proc/self/status", "CapEff with CAP_IPC_LOCK")
    if _capable(examined.sysfs, CAP_IPC_LOCK):
        return good("no limit: CAP_IPC_LOCK", capable)
    limit = memlock_limit(examined.sysfs) if examined.memlock is None else examined.memlock
    text = "unlimited" if limit == resource.RLIM_INFINITY else _mib(limit)
    read = Reading("/proc/self/limits", f"Max locked memory {text}"), Reading("/proc/self/status", "no CAP_IPC_LOCK")
    if limit != resource.RLIM_INFINITY and limit < examined.locked:
        kib = -(-examined.locked // 1024)
        return bad(MEMLOCK, *read, size=_mib(examined.locked), limit=text, kib=kib)
    return good(text, *read)


MEMORY = Check("memory", "Memory", "MemAvailable in `/proc/meminfo`", (SHORT,), _available)
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
