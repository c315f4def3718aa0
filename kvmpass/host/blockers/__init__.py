"""What speaks against assigning a device: one list, by which everything judges.

``list``, ``show``, ``plan``, ``bind`` and ``assign`` ask :func:`blockers`; ``doctor`` shows the same checks,
with what each of them read. A new reason is a ``Check`` in a module of this package, with its ``BlockerTemplate``.

Of bound devices, of what a plan or a user lacks, and of the host the reasons are elsewhere (``doctor``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from kvmpass.host.address import Bdf
from kvmpass.host.blocker import Blocker
from kvmpass.host.blockers import bars, group, kind, use
from kvmpass.host.blockers.group import is_harmless
from kvmpass.host.check import Check, CheckContext, Outcome, run_checks
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PciDevice, Sysfs

CHECKS: tuple[Check, ...] = tuple(chain(kind.CHECKS, group.CHECKS, use.CHECKS, bars.CHECKS))
"""In the order in which they are made, the most basic first. They find warnings, too."""

_REFUSING = tuple(
    check
    for check in CHECKS
    if check.id != "device" and any(not template.warning for template in check.templates)  # it is there
)


def check_assignable(sysfs: Sysfs, bdf: Bdf, together: Iterable[Bdf] = ()) -> PciDevice:
    """Return the device if it can be taken now; ``together`` names devices that are taken with it.

    Raises ``NoSuchDevice``, or the first of :func:`blockers`: ``NotAssignable`` (bridge, no IOMMU group, no-IOMMU
    group, and more); ``GroupNotViable`` with the siblings and their drivers; ``DeviceInUse`` with every use that is
    visible. A device that this very process holds is in use too.
    """
    device = sysfs.device(bdf)
    for blocker in blockers(sysfs, device, together, wake=True):
        raise blocker.exception()
    return device


def blockers(
    sysfs: Sysfs,
    device: PciDevice,
    together: Iterable[Bdf] = (),
    look: Look | None = None,
    *,
    wake: bool = False,
) -> Iterator[Blocker]:
    """Every reason why the device cannot be taken now, the most basic first; none: it can. One of each kind at most.

    Whoever asks about many devices passes one ``look``. ``wake``: ask a suspended device, too, which wakes it.
    """
    yield from _found(_REFUSING, CheckContext.of(sysfs, device, together, look, wake=wake))


def users(sysfs: Sysfs, device: PciDevice, look: Look | None = None) -> Iterator[Blocker]:
    """Of the reasons against a device those for which somebody must give it up first."""
    yield from _found(use.CHECKS, CheckContext.of(sysfs, device, (), look))


def _found(checks: Iterable[Check], context: CheckContext) -> Iterator[Blocker]:
    for finding in run_checks(tuple(checks), context):
        if finding.outcome is Outcome.FAIL and finding.blocker is not None:
            yield finding.blocker


__all__ = ["CHECKS", "blockers", "check_assignable", "is_harmless", "users"]
