"""The catalogue of all checks, as ``kvmpass doctor`` shows them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.backend import AUTO
from kvmpass.host.blockers import CHECKS as DEVICE_CHECKS
from kvmpass.host.check import Check, CheckContext, Finding, run_checks
from kvmpass.host.doctor import device, files, iommu, limits, memory, processor, rights, vfio
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs
from kvmpass.layout import GIB

CATALOGUE: tuple[Check, ...] = tuple(
    chain(
        *(processor.CHECKS, iommu.CHECKS, vfio.CHECKS, DEVICE_CHECKS, device.CHECKS, rights.CHECKS, memory.CHECKS),
        *(limits.MEMORY_CHECKS, limits.PROCESS_CHECKS, files.CHECKS),
    )
)
"""In the order in which they run: a check comes after those it depends on."""


def diagnose(
    sysfs: Sysfs,
    bdf: Bdf | None = None,
    *,
    memory: int = GIB,
    huge_page: int = 0,
    together: Collection[Bdf] = (),
    look: Look | None = None,
    cpus: int = 1,
    daemons: int = 0,
    memfds: int = 0,
    backend: str = AUTO,
    p2p: bool = False,
) -> list[Finding]:
    """Run every check; those of a device only with ``bdf``. Changes nothing, and raises nothing.

    ``memory`` is the guest's size in bytes, ``huge_page`` the size of its pages in bytes or 0, ``cpus`` its number of
    vCPUs, ``daemons`` how many serve it files, ``memfds`` how many regions of its memory are memfds; ``together`` are
    devices that are assigned with ``bdf``, ``backend`` the IOMMU back end that is asked for, ``p2p`` whether devices
    are to reach each other's BARs. Callers that check many devices pass one ``look``.
    """
    checks = [check for check in CATALOGUE if bdf is not None or not check.device]
    context = CheckContext(
        look or Look(sysfs),
        bdf,
        together=together,
        memory=memory,
        huge_page=huge_page,
        cpus=cpus,
        daemons=daemons,
        memfds=memfds,
        wanted_backend=backend,
        p2p=p2p,
    )
    return list(run_checks(checks, context))


def diagnose_device(look: Look, bdf: Bdf) -> list[Finding]:
    """Run only the checks of one device and of this user's permissions: for callers that check many devices."""
    return list(run_checks([*DEVICE_CHECKS, *device.CHECKS, *rights.CHECKS], CheckContext(look, bdf)))
