"""Bind devices to vfio-pci until :func:`unbind` or the next boot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from kvmpass._dataclass import dataclass, replace
from kvmpass._signals import deferred
from kvmpass.errors import DriverPinned
from kvmpass.host.address import Bdf, parse_distinct
from kvmpass.host.blocker import Blocker
from kvmpass.host.blockers import blockers, users
from kvmpass.host.blockers.kind import is_bridge
from kvmpass.host.drivers.changes import MATCHING, ON_VFIO_PCI, Setting, all_changes, check_privilege
from kvmpass.host.drivers.driverctl import saved_override
from kvmpass.host.drivers.journal import Journal, Operation
from kvmpass.host.drivers.lock import Say
from kvmpass.host.drivers.transaction import DRIVER_TIMEOUT, OnStep, Transaction
from kvmpass.host.sysfs import PCI_DRIVERS, VFIO_PCI, PciDevice, Sysfs

FORCE_HINT = "use --force to bind it nevertheless: what uses it will fail"


@dataclass(frozen=True, slots=True)
class Handover:
    """The result for one device; that of a dry run is a plan."""

    bdf: Bdf
    """The device."""
    outcome: Literal["changed", "already", "planned", "excluded"]
    """``already``: it had the driver; ``planned``: by a dry run; ``excluded``: a bridge of the group, unchanged."""
    before: str | None
    """The driver before; None without one."""
    after: str | None
    """The driver after; None without one; ``*`` in a dry run: whichever matches."""
    steps: tuple[str, ...] = ()
    """The writes to sysfs, as shell commands."""
    warnings: tuple[str, ...] = ()
    """Causes of blockers that do not block this operation."""


def bind(
    bdfs: Sequence[Bdf | str],
    *,
    group: bool = False,
    force: bool = False,
    dry_run: bool = False,
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    timeout: float = DRIVER_TIMEOUT,
    say: Say | None = None,
    on_step: OnStep | None = None,
) -> list[Handover]:
    """Bind devices to vfio-pci, all or none, until :func:`unbind` or the next boot. Returns one result for each.

    ``group``: with all other devices of their IOMMU groups, bridges excluded. The driver before is
    recorded in ``state_dir`` (as for :func:`borrow`). Borrowing a bound device leaves it bound. A process that is
    killed in between leaves an entry for :func:`restore`. ``force`` also binds devices that the host uses, or for
    which driverctl has saved another driver; never one that a process has open through VFIO, or has borrowed.
    ``timeout``, ``say`` and ``on_step`` as for :func:`borrow`.

    Raises, before any change, ``BadAddress``, ``NoSuchDevice``, ``NotAssignable`` (bridge, no IOMMU group),
    ``DeviceInUse``, ``DriverPinned``, ``PermissionError``, ``JournalError``; ``HostNotReady``, ``NotAssignable``,
    ``OSError`` after all changes are reverted, with a note if that failed. A sibling with a host driver, which makes
    the group not viable, is only a warning.
    """
    transaction = Transaction(sysfs or Sysfs(), Journal(state_dir), timeout, say, on_step)
    return _Work(Operation.BIND, group, force, transaction).run(parse_distinct(bdfs), dry_run)


def unbind(
    bdfs: Sequence[Bdf | str],
    *,
    group: bool = False,
    force: bool = False,
    dry_run: bool = False,
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    timeout: float = DRIVER_TIMEOUT,
    say: Say | None = None,
    on_step: OnStep | None = None,
) -> list[Handover]:
    """Rebind devices from vfio-pci to the drivers that they had before :func:`bind`, all or none.

    Without a record of this boot another program has bound them: then the kernel probes for a matching driver.
    Parameters and errors as for :func:`bind`; ``RestoreFailed`` if a driver does not bind its device. ``force`` is
    for a device for which driverctl has saved vfio-pci.
    """
    transaction = Transaction(sysfs or Sysfs(), Journal(state_dir), timeout, say, on_step)
    return _Work(Operation.UNBIND, group, force, transaction).run(parse_distinct(bdfs), dry_run)


@dataclass(frozen=True, slots=True)
class _Job:
    """One device and its wanted setting, None if nothing is to be changed."""

    bdf: Bdf
    now: Setting
    wanted: Setting | None = None
    warnings: tuple[str, ...] = ()

    def planned(self, sysfs: Sysfs) -> Handover:
        """Return the result of a dry run."""
        if self.wanted is None:
            return Handover(self.bdf, "already", self.now.driver, self.now.driver)
        steps = [str(change) for change in all_changes(self.bdf, self.now, self.wanted)]
        if self.wanted.driver == VFIO_PCI and not sysfs.exists(PCI_DRIVERS, VFIO_PCI):
            steps.insert(0, f"modprobe {VFIO_PCI}")
        return Handover(self.bdf, "planned", self.now.driver, self.wanted.driver, tuple(steps), self.warnings)


@dataclass(frozen=True, slots=True)
class _Work:
    """One call of :func:`bind` or :func:`unbind`."""

    operation: Operation
    group: bool
    force: bool
    transaction: Transaction

    @property
    def sysfs(self) -> Sysfs:
        return self.transaction.sysfs

    def run(self, bdfs: tuple[Bdf, ...], dry_run: bool) -> list[Handover]:
        """Change all devices, check that none was changed again, and commit; or revert all."""
        chosen, results = self._choose(bdfs)
        transaction = self.transaction
        if dry_run:
            for bdf in chosen:
                transaction.journal.read_unowned(self.sysfs, bdf)
            return self._sorted([*(job.planned(self.sysfs) for job in self._look(chosen)), *results])
        for bdf in chosen:
            check_privilege(self.sysfs, bdf)
        with transaction.lock():
            try:
                with deferred():
                    transaction.recover(chosen)
                    jobs = self._look(chosen)
                    wanted = {job.bdf: job.wanted for job in jobs if job.wanted is not None}
                    transaction.change(self.operation, wanted)
                    for job in jobs:  # the first may have been rebound while the last was changed
                        transaction.confirm(job.bdf, job.wanted or job.now)
                # A signal received until now is raised here: all changes are reverted. A later one has no effect.
                with deferred():
                    transaction.commit()
                    if self.operation is Operation.UNBIND:
                        # Last: the record of a device that is not on vfio-pci is harmless, a missing one is not.
                        for job in jobs:
                            transaction.journal.bound.remove(job.bdf)
            except BaseException as error:
                self._put_back(error)
                raise
            return self._sorted([*map(self._result, jobs), *results])

    def _put_back(self, error: BaseException) -> None:
        changed = self.transaction.entries[:]
        self.transaction.put_back(error)
        as_before = [
            str(entry.bdf)
            for entry in changed
            if self.sysfs.device_path(entry.bdf).exists() and self.sysfs.driver(entry.bdf) == entry.driver
        ]
        if as_before and not self.transaction.entries and isinstance(error, Exception):
            error.add_note(f"as before again: {', '.join(as_before)}")

    def _sorted(self, results: list[Handover]) -> list[Handover]:
        return sorted(results, key=lambda result: result.bdf) if self.group else results

    def _choose(self, given: tuple[Bdf, ...]) -> tuple[list[Bdf], list[Handover]]:
        """Return the devices to change, and the bridges of their groups, which are excluded."""
        devices = {bdf: self.sysfs.device(bdf) for bdf in given}
        excluded = {}
        for number in sorted({device.group for device in devices.values() if device.group is not None}):
            for member in self.sysfs.group(number).devices if self.group else ():
                device = self.sysfs.device(member)
                if member not in given and is_bridge(device, self.sysfs.config(member, 0x40, wake=False)):
                    excluded[member] = Handover(member, "excluded", device.driver, device.driver)
                else:
                    devices.setdefault(member, device)
        return list(devices), list(excluded.values())

    def _result(self, job: _Job) -> Handover:
        if job.wanted is None:
            return job.planned(self.sysfs)
        return replace(job.planned(self.sysfs), outcome="changed", after=self.sysfs.driver(job.bdf))

    # --- blockers

    def _look(self, chosen: Sequence[Bdf]) -> list[_Job]:
        look = self._look_bind if self.operation is Operation.BIND else self._look_unbind
        return [look(self.sysfs.device(bdf), chosen) for bdf in chosen]

    def _look_bind(self, device: PciDevice, together: Sequence[Bdf]) -> _Job:
        now = Setting.of(self.sysfs, device.bdf)
        if now.driver == VFIO_PCI:
            return _Job(device.bdf, now)
        warnings = self._weigh(blockers(self.sysfs, device, together, wake=True))
        warnings += self._pinned(device.bdf, on_vfio_pci=False)
        return _Job(device.bdf, now, ON_VFIO_PCI, tuple(warnings))

    def _look_unbind(self, device: PciDevice, together: Sequence[Bdf]) -> _Job:
        now = Setting.of(self.sysfs, device.bdf)
        if now.driver != VFIO_PCI:
            return _Job(device.bdf, now)
        warnings = self._weigh(users(self.sysfs, device))
        warnings += self._pinned(device.bdf, on_vfio_pci=True)
        record = self.transaction.journal.bound.read(device.bdf)
        if record is not None and not record.is_stale(self.sysfs):
            return _Job(device.bdf, now, record.before, tuple(warnings))
        return _Job(
            device.bdf, now, Setting(MATCHING, None if now.override == VFIO_PCI else now.override), tuple(warnings)
        )

    def _weigh(self, found: Iterable[Blocker]) -> list[str]:
        """Raise the first blocker of this operation; return the causes of the others as warnings."""
        warnings = []
        for blocker in found:
            if blocker.bindable or (blocker.forceable and self.force):
                more = "; --group binds them too" if blocker.blocked_by and not self.group else ""
                warnings.append(blocker.cause + more)
                continue
            error = blocker.exception()
            if blocker.forceable:
                error.add_note(FORCE_HINT)
            raise error
        return warnings

    def _pinned(self, bdf: Bdf, *, on_vfio_pci: bool) -> list[str]:
        """Raise ``DriverPinned`` if driverctl has saved another driver; with ``force`` return a warning."""
        saved = saved_override(self.sysfs, bdf)
        if saved is None or (saved.driver == VFIO_PCI) is not on_vfio_pci:
            return []
        cause = f"driverctl sets {bdf} to {saved.words} at each boot"
        if self.force:
            return [cause]
        error = DriverPinned(cause, f"driverctl unset-override {bdf}")
        error.add_note(f"use --force to {self.operation} it until then")
        raise error
