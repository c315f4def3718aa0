"""What every assignment needs, from the firmware to the permissions of files: one catalogue of checks.

``kvmpass doctor`` shows all of it; :func:`check_host` and :func:`check_memory` refuse by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.blockers import CHECKS as DEVICE_CHECKS
from kvmpass.host.check import Check, CheckContext, Finding, Outcome, Reading, run_checks
from kvmpass.host.doctor import device, iommu, limits, memory, processor, rights, vfio
from kvmpass.host.doctor.iommu import interrupt_remapping
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs
from kvmpass.layout import GIB

CATALOGUE: tuple[Check, ...] = tuple(
    chain(
        *(processor.CHECKS, iommu.CHECKS, vfio.CHECKS, DEVICE_CHECKS, device.CHECKS, rights.CHECKS, memory.CHECKS),
        *(limits.MEMORY_CHECKS, limits.PROCESS_CHECKS),
    )
)
"""In the order in which they are made: what others need comes before them."""


def diagnose(
    sysfs: Sysfs,
    bdf: Bdf | None = None,
    *,
    memory: int = GIB,
    huge_page: int = 0,
    together: Iterable[Bdf] = (),
    look: Look | None = None,
    cpus: int = 1,
) -> list[Finding]:
    """Make every check; those that ask about a device only with ``bdf``. Changes nothing, and raises nothing.

    ``memory`` is the guest's in bytes, ``huge_page`` the page size in bytes that it must have, or 0; ``together`` are
    devices that are taken with ``bdf``, ``cpus`` the guest's. Whoever asks about many devices passes one ``look``.
    """
    checks = [check for check in CATALOGUE if bdf is not None or not check.device]
    context = CheckContext(sysfs, bdf, together=together, memory=memory, huge_page=huge_page, look=look, cpus=cpus)
    return list(run_checks(checks, context))


def diagnose_device(sysfs: Sysfs, bdf: Bdf, look: Look | None = None) -> list[Finding]:
    """Make the checks that ask about one device, and what this user may do with it: for whoever asks about many."""
    return list(run_checks([*DEVICE_CHECKS, *device.CHECKS, *rights.CHECKS], CheckContext(sysfs, bdf, look=look)))


def check_host(sysfs: Sysfs) -> None:
    """Check what every assignment needs: AMD-V, KVM, AMD-Vi with interrupt remapping, VFIO, the right to use them.

    Raises ``HostNotReady`` or ``PermissionError`` for the first of the catalogue's vital checks that fails. Loads no
    module: it is enough that vfio-pci can be loaded.
    """
    _refuse([check for check in CATALOGUE if check.vital], CheckContext(sysfs))


def check_memory(
    sysfs: Sysfs,
    size_bytes: int,
    *,
    huge_page: int = 0,
    locked: int | None = None,
    memlock: int | None = None,
    overhead: int | None = None,
) -> None:
    """Check that ``size_bytes`` of guest memory exist, for this process's cgroups, too, and may be locked.

    ``locked`` is more if there is more to lock, ``overhead`` what is needed beside it, in bytes, if that is known.

    ``huge_page`` is the page size in bytes when the memory comes from hugetlbfs, else 0. ``memlock`` replaces
    RLIMIT_MEMLOCK (bytes, -1 without limit), which does not count under CAP_IPC_LOCK. Raises ``NotEnoughMemory``:
    pinning more than there is would wake the out-of-memory killer instead.
    """
    context = CheckContext(
        sysfs, memory=size_bytes, huge_page=huge_page, locked=locked, memlock=memlock, overhead=overhead
    )
    _refuse((*memory.CHECKS, *limits.MEMORY_CHECKS), context)


def check_limits(
    sysfs: Sysfs, size_bytes: int, *, huge_page: int = 0, cpus: int = 1, together: Iterable[Bdf] = ()
) -> None:
    """Check this process's limits before a machine of ``size_bytes`` with ``cpus`` and devices ``together`` is made.

    Raises ``NotEnoughMemory`` (address space) or ``HostNotReady`` (threads, descriptors, file size).
    """
    context = CheckContext(sysfs, memory=size_bytes, huge_page=huge_page, cpus=cpus, together=together)
    _refuse(limits.PROCESS_CHECKS, context)


def _refuse(checks: Iterable[Check], context: CheckContext) -> None:
    for finding in run_checks(list(checks), context):
        if finding.outcome is Outcome.FAIL and finding.blocker is not None:
            raise finding.blocker.exception()


__all__ = [
    "CATALOGUE",
    "Check",
    "Finding",
    "Outcome",
    "Reading",
    "check_host",
    "check_limits",
    "check_memory",
    "diagnose",
    "diagnose_device",
    "interrupt_remapping",
]
