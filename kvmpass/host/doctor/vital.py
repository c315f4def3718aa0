"""What every assignment requires of the host: the part of the catalogue that ``assign`` loads, and raises for."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.backend import AUTO, BackendChoice
from kvmpass.host.blocker import Blocker
from kvmpass.host.check import Check, CheckContext, failures
from kvmpass.host.doctor import iommu, processor, rights, vfio
from kvmpass.host.look import Look
from kvmpass.host.sysfs import Sysfs

VITAL: tuple[Check, ...] = tuple(
    check for check in chain(processor.CHECKS, iommu.CHECKS, vfio.CHECKS, rights.CHECKS) if check.vital
)
"""The checks of the catalogue that are vital, in its order."""


def check_host(
    sysfs: Sysfs,
    *,
    backend: str = AUTO,
    p2p: bool = False,
    together: Collection[Bdf] = (),
    passed: BackendChoice | None = None,
    look: Look | None = None,
) -> None:
    """Check what every assignment needs: AMD-V, KVM, AMD-Vi with interrupt remapping, VFIO, permission to use them.

    ``backend`` is the IOMMU back end that is asked for, ``p2p`` whether devices are to reach each other's BARs,
    ``together`` are the devices to assign. ``passed``: the back end whose descriptors another process has opened;
    then this one needs permission for ``/dev/kvm`` only. ``look``: the view of the host at this moment, if the
    caller has one.
    Raises ``HostNotReady`` or ``PermissionError`` for the first of the catalogue's vital checks that fails. Loads no
    module: it is sufficient that vfio-pci can be loaded.
    """
    found = host_blocker(sysfs, backend=backend, p2p=p2p, together=together, passed=passed, look=look)
    if found is not None:
        raise found.exception()


def host_blocker(
    sysfs: Sysfs,
    *,
    backend: str = AUTO,
    p2p: bool = False,
    together: Collection[Bdf] = (),
    passed: BackendChoice | None = None,
    look: Look | None = None,
) -> Blocker | None:
    """Return the blocker for which :func:`check_host` raises; None if this host and this user can assign devices."""
    context = CheckContext(look or Look(sysfs), wanted_backend=backend, p2p=p2p, together=together, passed=passed)
    return next(failures(VITAL, context), None)
