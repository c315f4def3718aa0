"""What a guest takes of the host's memory and of this process's limits: the checks, and what raises for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvmpass.host.address import Bdf
from kvmpass.host.check import Check, CheckContext, Finding, failures, run_checks
from kvmpass.host.doctor import limits, memory
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs


def diagnose_huge_pages(sysfs: Sysfs, size_bytes: int, page: int) -> list[Finding]:
    """Run the checks of huge pages alone: whether ``size_bytes`` are available in pages of ``page`` bytes.

    The first finding is that of the host's pool, the other that of the limits of this process's cgroups.
    """
    checks = (*memory.CHECKS, *limits.MEMORY_CHECKS)
    context = CheckContext(Look(sysfs), memory=size_bytes, huge_page=page)
    return list(run_checks((check for check in checks if check.id in ("huge-pages", "cgroup-huge-pages")), context))


def check_memory(
    sysfs: Sysfs,
    size_bytes: int,
    *,
    huge_page: int = 0,
    locked: int | None = None,
    overhead: int | None = None,
    look: Look | None = None,
) -> None:
    """Check that the host and this process's cgroups have ``size_bytes`` of guest memory, and that it may be locked.

    ``locked`` is the number of bytes to lock if it differs, ``overhead`` the bytes that the guest needs besides its
    memory, if known. ``huge_page`` is the page size in bytes if the memory comes from hugetlbfs, else 0. ``look`` as
    for :func:`kvmpass.host.doctor.vital.check_host`. Raises ``NotEnoughMemory``: pinning more than is available would
    invoke the OOM killer instead.
    """
    look = look or Look(sysfs)
    context = CheckContext(look, memory=size_bytes, huge_page=huge_page, locked=locked, overhead=overhead)
    _refuse((*memory.CHECKS, *limits.MEMORY_CHECKS), context)


def check_limits(
    sysfs: Sysfs,
    size_bytes: int,
    *,
    huge_page: int = 0,
    cpus: int = 1,
    daemons: int = 0,
    memfds: int = 0,
    together: Collection[Bdf] = (),
    look: Look | None = None,
) -> None:
    """Check this process's resource limits for a machine of ``size_bytes`` with ``cpus`` and devices ``together``.

    ``daemons`` and ``memfds`` as for :class:`CheckContext`, ``look`` as for :func:`check_memory`. Raises
    ``NotEnoughMemory`` (address space) or ``HostNotReady`` (threads, descriptors, file size).
    """
    look = look or Look(sysfs)
    context = CheckContext(
        look,
        memory=size_bytes,
        huge_page=huge_page,
        cpus=cpus,
        daemons=daemons,
        memfds=memfds,
        together=together,
    )
    _refuse(limits.PROCESS_CHECKS, context)


def _refuse(checks: Iterable[Check], context: CheckContext) -> None:
    for blocker in failures(checks, context):
        raise blocker.exception()
