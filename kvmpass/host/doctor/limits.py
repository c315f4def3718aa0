"""Resource limits of this process and its cgroups that would make an assignment fail half-way, or kill it."""

from __future__ import annotations

from collections.abc import Iterable

from kvmpass._dataclass import replace
from kvmpass.errors import NotEnoughMemory
from kvmpass.host import limits
from kvmpass.host.blocker import BlockerTemplate, mib
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.limits import Ceiling, rlimit
from kvmpass.layout import MIB

LIMITS = "/proc/self/limits"
CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24  # include/uapi/linux/capability.h
_STACK = 8 * MIB  # of a thread, by default
_ARENA = 64 * MIB  # reserved by malloc for a thread that allocates
_SMALLEST_FILE = MIB  # journal and status file are far smaller

CGROUP_MEMORY = BlockerTemplate(
    kind="cgroup-memory",
    brief="{left} of {size} left in {cgroup}",
    cause="the guest and what it takes to run it need {size} of memory, and {file} leaves {left}: the kernel would "
    "kill kvmpass while it fills the guest's memory",
    remedy="give the guest less memory, or the cgroup more: for a systemd unit MemoryMax= (systemd-run: -p "
    "MemoryMax=SIZE), for a container its memory limit. Swap is no help: a guest's memory is pinned",
    commands=("{command}",),
    error=NotEnoughMemory,
)
CGROUP_HIGH = replace(
    CGROUP_MEMORY,
    kind="cgroup-memory-high",
    cause="the guest and what it takes to run it need {size} of memory, and {file} leaves {left}: the kernel would "
    "throttle kvmpass while it is above, and a guest's pinned memory cannot be reclaimed",
    remedy="give the guest less memory, or the cgroup more: for a systemd unit MemoryHigh=",
)
CGROUP_HUGE_PAGES = replace(
    CGROUP_MEMORY,
    kind="cgroup-huge-pages",
    cause="the guest needs {size} of huge pages, and {file} leaves {left}: an access beyond would be a SIGBUS",
    remedy="give the guest less memory, or the cgroup more (systemd has no option for it; a container runtime may "
    "have)",
)
FEW_TASKS = BlockerTemplate(
    kind="tasks-low",
    brief="{left} of {needed} left",
    cause="an assignment with {cpus} vCPUs has up to {needed} threads and processes, and {file} leaves {left}",
    remedy="raise the limit: for a systemd unit TasksMax=, for a container its pids limit; RLIMIT_NPROC by "
    "LimitNPROC= of a unit, ulimit -u, or nproc in limits.conf",
    commands=("{command}",),
)
ADDRESS_SPACE = BlockerTemplate(
    kind="address-space-low",
    brief="{name} {limit}",
    cause="the guest's memory and the threads need {size} more of this process's address space, and {name} is "
    "{limit} of which {used} are used",
    remedy="raise the limit: for a systemd unit {option}=, else ulimit {flag}, or {item} in limits.conf",
    commands=("{command}",),
    error=NotEnoughMemory,
)
FEW_DESCRIPTORS = BlockerTemplate(
    kind="descriptors-low",
    brief="{limit} of {needed}",
    cause="{needed} file descriptors are needed, {limit} are allowed (RLIMIT_NOFILE, the hard limit)",
    remedy="raise the limit: for a systemd unit LimitNOFILE=, else ulimit -Hn, or nofile in limits.conf",
    commands=("{command}",),
)
FILE_SIZE = BlockerTemplate(
    kind="file-size-low",
    brief="{limit} bytes",
    cause="this process may write files of {limit} bytes only (RLIMIT_FSIZE): too little for the journal, from "
    "which a killed assignment is restored",
    remedy="raise the limit: for a systemd unit LimitFSIZE=, else ulimit -f, or fsize in limits.conf",
    commands=("{command}",),
)
CPU_TIME = BlockerTemplate(
    kind="cpu-time-limited",
    brief="{limit} s of CPU time",
    cause="this process may use {limit} s of CPU time (RLIMIT_CPU), the guest's included: then the kernel ends it "
    "with SIGXCPU, at any point",
    remedy="raise the limit for long-running guests: for a systemd unit LimitCPU=infinity, else ulimit -t unlimited. "
    "kvmpass restore rebinds devices that a killed process has left",
    warning=True,
)


def overhead(context: CheckContext) -> int:
    """Return the bytes that the guest needs besides its memory."""
    if context.overhead is not None:
        return context.overhead
    return limits.needed_besides(0 if context.huge_page else context.memory)


def _command(ceiling: Ceiling, option: str, value: object) -> str:
    """Return the command that raises a cgroup's limit."""
    unit = ceiling.cgroup.unit
    if unit is None or option == "" or unit.startswith(("docker-", "libpod-", "cri-")):
        return f"echo {value} > {ceiling.path}"
    manager = " --user" if ceiling.cgroup.is_users else ""
    return f"systemctl{manager} set-property --runtime {unit} {option}={value}"


def raising(context: CheckContext, option: str, ulimit: str, value: int, unit: int = 1) -> str:
    """Return the command that raises a limit of this process: its unit's option, or ``ulimit`` (in units)."""
    service = limits.own_unit(context.sysfs)
    if service is None:
        return f"{ulimit} {-(-value // unit)}"
    place = f"/etc/systemd/{'user' if service.is_users else 'system'}/{service.unit}.d"
    reload = f"systemctl{' --user' if service.is_users else ''} daemon-reload"
    return f"mkdir -p {place}; printf '[Service]\\n{option}={value}\\n' > {place}/kvmpass.conf; {reload}"


def _tightest(ceilings: Iterable[Ceiling]) -> Ceiling | None:
    return min(ceilings, key=lambda ceiling: ceiling.left, default=None)


def _readings(ceilings: list[Ceiling], unit: int = MIB, name: str = " MiB") -> list[Reading]:
    return [
        Reading(ceiling.path, f"{ceiling.limit // unit}{name}, {ceiling.left // unit}{name} of it left")
        for ceiling in ceilings
    ] or [Reading("/proc/self/cgroup", "no limit up to the root")]


def _full(template: BlockerTemplate, ceiling: Ceiling, needed: int, option: str, read: list[Reading]) -> Verdict:
    """Return the verdict for a cgroup that has less than the ``needed`` bytes left; ``option`` is that of systemd."""
    command = _command(ceiling, option, ceiling.limit + needed - ceiling.left)
    sizes = {"size": mib(needed), "left": mib(ceiling.left)}
    place = ceiling.cgroup.unit or f"/{ceiling.cgroup.directory}"
    return failed(template, *read, **sizes, cgroup=place, file=ceiling.path, command=command)


@precondition(
    "cgroup-memory",
    "Memory of its cgroups",
    "`memory.max`, `memory.high` (version 1: `memory.limit_in_bytes`, `memory.memsw.limit_in_bytes`) of "
    "`/proc/self/cgroup`'s cgroup and those above it, less what they use",
    (CGROUP_MEMORY, CGROUP_HIGH),
)
def _cgroup_memory(context: CheckContext) -> Verdict:
    sysfs = context.sysfs
    ceilings = limits.memory_ceilings(sysfs)
    read = _readings(ceilings)
    wanted = context.memory if not context.huge_page or limits.counts_huge_pages(sysfs) else 0
    needed = wanted + overhead(context)
    for template, option, chosen in (
        (CGROUP_MEMORY, "MemoryMax", [ceiling for ceiling in ceilings if not ceiling.file.endswith(".high")]),
        (CGROUP_HIGH, "MemoryHigh", [ceiling for ceiling in ceilings if ceiling.file.endswith(".high")]),
    ):
        tightest = _tightest(chosen)
        if tightest is not None and tightest.left < needed:
            return _full(template, tightest, needed, option, read)
    tightest = _tightest(ceilings)
    return passed("no limit" if tightest is None else f"{mib(tightest.left)} left, {mib(needed)} wanted", *read)


@precondition(
    "cgroup-huge-pages",
    "Huge pages of its cgroups",
    "`hugetlb.SIZE.max` and `hugetlb.SIZE.rsvd.max` (version 1: `limit_in_bytes`) up to the root, with `--hugepages`",
    (CGROUP_HUGE_PAGES,),
)
def _cgroup_huge_pages(context: CheckContext) -> Verdict:
    if not context.huge_page:
        return passed("not requested", Reading("/proc/self/cgroup", "not read"))
    ceilings = limits.huge_page_ceilings(context.sysfs, context.huge_page)
    tightest = _tightest(ceilings)
    if tightest is None or tightest.left >= context.memory:
        return passed("no limit" if tightest is None else f"{mib(tightest.left)} left", *_readings(ceilings))
    return _full(CGROUP_HUGE_PAGES, tightest, context.memory, "", _readings(ceilings))


@precondition(
    "tasks",
    "Threads and processes",
    f"`pids.max` of its cgroups up to the root; Max processes in `{LIMITS}`, which has no effect for root",
    (FEW_TASKS,),
)
def _tasks(context: CheckContext) -> Verdict:
    sysfs, needed = context.sysfs, limits.threads_needed(context.look, context.cpus)
    ceilings = limits.task_ceilings(sysfs)
    read = _readings(ceilings, 1, "")
    found = []
    if (tightest := _tightest(ceilings)) is not None:
        command = _command(tightest, "TasksMax", tightest.limit + needed - tightest.left)
        found.append((tightest.left, tightest.path, command))
    own = rlimit(context.look, "Max processes")
    if own.soft is not None and not _exempt(context):
        left = max(0, own.soft - limits.tasks_of_user(sysfs, context.user))
        read.append(Reading(LIMITS, f"Max processes {own.soft}, {left} of them left"))
        found.append((left, "RLIMIT_NPROC", raising(context, "LimitNPROC", "ulimit -u", own.soft + needed - left)))
    for left, file, command in found:
        if left < needed:
            values = {"cpus": context.cpus, "needed": needed, "left": left}
            return failed(FEW_TASKS, *read, **values, file=file, command=command)
    return passed(f"{needed} at most", *read)


def _exempt(context: CheckContext) -> bool:
    """Whether RLIMIT_NPROC has no effect (kernel/fork.c: copy_process)."""
    return context.user == 0 or any(map(context.capable, (CAP_SYS_ADMIN, CAP_SYS_RESOURCE)))


@precondition(
    "address-space",
    "Address space",
    f"Max address space and Max data size in `{LIMITS}`; VmSize and VmData in `/proc/self/status`",
    (ADDRESS_SPACE,),
)
def _address_space(context: CheckContext) -> Verdict:
    """RLIMIT_AS counts memory, stacks and heaps of threads, RLIMIT_DATA memory and stacks."""
    threads = limits.threads_needed(context.look, context.cpus)
    memory = context.memory + max(2 * MIB, context.huge_page)
    read = []
    for line, name, option, flag, item, field, needed in (
        ("Max address space", "RLIMIT_AS", "LimitAS", "-v", "as", "VmSize", memory + threads * (_STACK + _ARENA)),
        ("Max data size", "RLIMIT_DATA", "LimitDATA", "-d", "data", "VmData", memory + threads * _STACK + _ARENA),
    ):
        limit = rlimit(context.look, line)
        if limit.soft is None:
            read.append(Reading(LIMITS, f"{line} unlimited"))
            continue
        used = context.own_memory(field)
        read.append(Reading(LIMITS, f"{line} {mib(limit.soft)}, {field} {mib(used)}"))
        if limit.soft - used < needed:
            values = {"name": name, "option": option, "flag": flag, "item": item}
            values |= {"size": mib(needed), "limit": mib(limit.soft), "used": mib(used)}
            command = raising(context, option, f"ulimit {flag}", used + needed, 1024)
            return failed(ADDRESS_SPACE, *read, **values, command=command)
    return passed("enough", *read)


@precondition("descriptors", "File descriptors", f"Max open files in `{LIMITS}`", (FEW_DESCRIPTORS,))
def _descriptors(context: CheckContext) -> Verdict:
    limit = rlimit(context.look, "Max open files")
    devices = {*context.together, *([context.bdf] if context.bdf else [])}
    found = {context.look.device(bdf) for bdf in devices}
    groups = {device.group for device in found if device is not None}
    needed = limits.descriptors_needed(
        max(1, len(devices)), max(1, len(groups)), context.cpus, context.daemons, context.memfds
    )
    read = Reading(LIMITS, f"Max open files {'unlimited' if limit.hard is None else limit.hard} (hard)")
    if limit.hard is not None and limit.hard < needed:
        command = raising(context, "LimitNOFILE", "ulimit -Hn", needed)
        return failed(FEW_DESCRIPTORS, read, needed=needed, limit=limit.hard, command=command)
    return passed(f"{needed} needed", read)


@precondition("file-size", "File size", f"Max file size in `{LIMITS}`", (FILE_SIZE,))
def _file_size(context: CheckContext) -> Verdict:
    limit = rlimit(context.look, "Max file size")
    read = Reading(LIMITS, f"Max file size {'unlimited' if limit.soft is None else limit.soft}")
    if limit.soft is not None and limit.soft < _SMALLEST_FILE:
        command = raising(context, "LimitFSIZE", "ulimit -f", _SMALLEST_FILE, 1024)
        return failed(FILE_SIZE, read, limit=limit.soft, command=command)
    return passed("enough", read)


@precondition("cpu-time", "CPU time", f"Max cpu time in `{LIMITS}`", (CPU_TIME,))
def _cpu_time(context: CheckContext) -> Verdict:
    limit = rlimit(context.look, "Max cpu time")
    read = Reading(LIMITS, f"Max cpu time {'unlimited' if limit.soft is None else limit.soft}")
    return passed("unlimited", read) if limit.soft is None else failed(CPU_TIME, read, limit=limit.soft)


MEMORY_CHECKS = (_cgroup_memory, _cgroup_huge_pages)
"""Limits for populating memory."""

PROCESS_CHECKS = (_address_space, _tasks, _descriptors, _file_size, _cpu_time)
"""Limits for the rest of an assignment."""
