"""What blocks the assignment of a device: the one list for all commands.

``list``, ``show``, ``plan``, ``bind`` and ``assign`` call :func:`blockers`; ``doctor`` shows the same checks, and
what each of them has read. A new blocker is a ``Check`` in a module of this package, with its ``BlockerTemplate``.

Checks of the host, of the guest's memory and of this user's permissions are in :mod:`kvmpass.host.doctor`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.blocker import Blocker
from kvmpass.host.blockers import bars, group, kind, use
from kvmpass.host.blockers.group import is_harmless
from kvmpass.host.check import Check, CheckContext, failures
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PciDevice, Sysfs

CHECKS: tuple[Check, ...] = tuple(chain(kind.CHECKS, group.CHECKS, use.CHECKS, bars.CHECKS))
"""In the order in which they run, the most basic first. Some of their blockers are warnings."""

_REFUSING = tuple(
    check
    for check in CHECKS
    if check.id != "device" and any(not template.warning for template in check.templates)  # the caller has read it
)


def check_assignable(
    sysfs: Sysfs, bdf: Bdf, together: Collection[Bdf] = (), *, look: Look | None = None
) -> PciDevice:
    """Return the device if it can be assigned now; ``together`` are devices that are assigned with it.

    ``look``: the view of the host at this moment, if the caller has one.
    Raises ``NoSuchDevice``, or the exception of the first of :func:`blockers`: ``NotAssignable`` (bridge, no IOMMU
    group, no-IOMMU group, and more); ``GroupNotViable`` with the siblings and their drivers; ``DeviceInUse`` with
    every visible use. A device that this process has open is in use, too.
    """
    look = look or Look(sysfs)
    device = look.require(bdf)
    for blocker in blockers(sysfs, device, together, look, wake=True):
        raise blocker.exception()
    return device


def check_passed(sysfs: Sysfs, bdf: Bdf, together: Collection[Bdf] = (), *, look: Look | None = None) -> PciDevice:
    """Return the device if it can be assigned by a descriptor that was passed, which is a use that counts not here.

    Otherwise as :func:`check_assignable`.
    """
    context = CheckContext(look or Look(sysfs), bdf, together=together, wake=True, shown=False)
    for blocker in failures((check for check in _REFUSING if check not in use.CHECKS), context):
        raise blocker.exception()
    return context.device


def blockers(
    sysfs: Sysfs,
    device: PciDevice,
    together: Collection[Bdf] = (),
    look: Look | None = None,
    *,
    wake: bool = False,
) -> Iterator[Blocker]:
    """Yield every blocker of the device, the most basic first, at most one of each kind; none if it can be assigned.

    Callers that check many devices pass one ``look``. ``wake``: resume a suspended device to read its registers.
    """
    look = look or Look(sysfs)
    look.know([device])
    yield from failures(_REFUSING, CheckContext(look, device.bdf, together=together, wake=wake, shown=False))


def users(sysfs: Sysfs, device: PciDevice) -> Iterator[Blocker]:
    """Yield only the blockers that end when a process or the host stops using the device."""
    look = Look(sysfs)
    look.know([device])
    yield from failures(use.CHECKS, CheckContext(look, device.bdf, wake=False, shown=False))


__all__ = ["CHECKS", "blockers", "check_assignable", "check_passed", "is_harmless", "users"]
