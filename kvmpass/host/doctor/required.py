"""What an assignment requires of the host, and raises for: the part of the catalogue that ``assign`` loads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.backend import AUTO, BackendChoice
from kvmpass.host.blocker import Blocker
from kvmpass.host.check import Check, CheckContext, Finding, failures, run_checks
from kvmpass.host.doctor import iommu, limits, memory, processor, rights, vfio
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs

VITAL: tuple[Check, ...] = tuple(
    check for check in chain(processor.CHECKS, iommu.CHECKS, vfio.CHECKS, rights.CHECKS) if check.vital
)
"""The checks of the catalogue that are vital, in its order."""


def diagnose_huge_pages(sysfs: Sysfs, size_bytes: int, page: int) -> list[Finding]:
    """Run the checks of huge pages alone: whether ``size_bytes`` are available in pages of ``page`` bytes.

    The first finding is that of the host's pool, the other that of the limits of this process's cgroups.
    """
    checks = (*memory.CHECKS, *limits.MEMORY_CHECKS)
    context = CheckContext(Look(sysfs), memory=size_bytes, huge_page=page)
    return list(run_checks((check for check in checks if check.id in ("huge-pages", "cgroup-huge-pages")), context))


def check_host(
    sysfs: Sysfs,
    *,
    backend: str = AUTO,
    p2p: bool = False,
    together: Collection[Bdf] = (),
    passed: BackendChoice | None = None,
) -> None:
    """Check what every assignment needs: AMD-V, KVM, AMD-Vi with interrupt remapping, VFIO, permission to use them.

    ``backend`` is the IOMMU back end that is asked for, ``p2p`` whether devices are to reach each other's BARs,
    ``together`` are the devices to assign. ``passed``: the back end whose descriptors another process has opened;
    then this one needs permission for ``/dev/kvm`` only.
    Raises ``HostNotReady`` or ``PermissionError`` for the first of the catalogue's vital checks that fails. Loads no
    module: it is sufficient that vfio-pci can be loaded.
    """
    if blocker := host_blocker(sysfs, backend=backend, p2p=p2p, together=together, passed=passed):
        raise blocker.exception()


def host_blocker(
    sysfs: Sysfs,
    *,
    backend: str = AUTO,
    p2p: bool = False,
    together: Collection[Bdf] = (),
    passed: BackendChoice | None = None,
) -> Blocker | None:
    """Return the blocker for which :func:`check_host` raises; None if this host and this user can assign devices."""
    context = CheckContext(Look(sysfs), wanted_backend=backend, p2p=p2p, together=together, passed=passed)
    return next(failures(VITAL, context), None)


def check_memory(
    sysfs: Sysfs,
    size_bytes: int,
    *,
    huge_page: int = 0,
    locked: int | None = None,
    overhead: int | None = None,
) -> None:
    """Check that the host and this process's cgroups have ``size_bytes`` of guest memory, and that it may be locked.

    ``locked`` is the number of bytes to lock if it differs, ``overhead`` the bytes that the guest needs besides its
    memory, if known. ``huge_page`` is the page size in bytes if the memory comes from hugetlbfs, else 0. Raises
    ``NotEnoughMemory``: pinning more than is available would invoke the OOM killer instead.
    """
    context = CheckContext(Look(sysfs), memory=size_bytes, huge_page=huge_page, locked=locked, overhead=overhead)
    _refuse((*memory.CHECKS, *limits.MEMORY_CHECKS), context)


def check_limits(
    sysfs: Sysfs, size_bytes: int, *, huge_page: int = 0, cpus: int = 1, together: Collection[Bdf] = ()
) -> None:
    """Check this process's resource limits for a machine of ``size_bytes`` with ``cpus`` and devices ``together``.

    Raises ``NotEnoughMemory`` (address space) or ``HostNotReady`` (threads, descriptors, file size).
    """
    context = CheckContext(Look(sysfs), memory=size_bytes, huge_page=huge_page, cpus=cpus, together=together)
    _refuse(limits.PROCESS_CHECKS, context)


def _refuse(checks: Iterable[Check], context: CheckContext) -> None:
    for blocker in failures(checks, context):
        raise blocker.exception()
