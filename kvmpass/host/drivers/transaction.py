"""Transactions over the drivers of devices: record, change, confirm, and commit or revert."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial

from kvmpass._log import Log
from kvmpass._signals import deferred
from kvmpass._together import run_together
from kvmpass.errors import JournalError, KvmpassError, NoSuchDevice, NotAssignable, RestoreFailed
from kvmpass.host.address import Bdf
from kvmpass.host.drivers.changes import (
    MATCHING,
    PROBES,
    UNBINDS,
    Change,
    Setting,
    Step,
    driver_changes,
    override_changes,
    power_changes,
)
from kvmpass.host.drivers.journal import Entry, Journal, Operation
from kvmpass.host.drivers.lock import Say, device_lock
from kvmpass.host.drivers.nodes import check_closed, wait_for_node, wait_until
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PCI_DRIVERS, VFIO_PCI, PciDevice, Sysfs
from kvmpass.host.usage import usage

log = Log(__name__)

DRIVER_TIMEOUT = 30.0  # seconds a driver may take to be unbound from a device, or bound to it
NODE_TIMEOUT = 5.0  # seconds until /dev/vfio/GROUP exists, and until the driver link does
RESTORE_HINT = "try again: kvmpass restore"

OnStep = Callable[[Step, Bdf], object]
"""Called with each step and its device once the journal has it, just before the change. Each device has a thread."""


class Transaction:
    """Changes the drivers of several devices together. Without a commit they are reverted, at the latest at exit.

    The order is that of the methods: ``recover`` and ``change`` the devices, ``confirm`` each, then ``commit`` or
    ``put_back``. The caller holds the :meth:`lock`, except for ``put_back``, which takes it if necessary.

    ``timeout`` is in seconds, for each write that may block; ``say`` is for the lock; ``on_step`` is called before
    each step, to show progress, and for tests to fail there.

    Synchronization: for one thread. In a forked child ``put_back`` does nothing: the devices are the parent's.
    """

    def __init__(
        self,
        sysfs: Sysfs,
        journal: Journal,
        timeout: float = DRIVER_TIMEOUT,
        say: Say | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.sysfs = sysfs
        self.journal = journal
        self.entries: list[Entry] = []  # of the devices to revert
        self._timeout = timeout
        self._say = say
        self._on_step = on_step
        self._pid = os.getpid()

    def lock(self) -> AbstractContextManager[None]:
        """Return the lock for changes of drivers; see :meth:`Journal.lock`."""
        return self.journal.lock(self._say)

    def recover(self, bdfs: Iterable[Bdf]) -> None:
        """Restore those of the devices first that a killed process has left, at the same time.

        Raises ``DeviceInUse`` if a running process has borrowed one, before it restores any, and what
        :meth:`give_back` raises.
        """
        left = [entry for bdf in bdfs if (entry := self.journal.read_unowned(self.sysfs, bdf)) is not None]
        run_together(*(partial(self._recover, entry) for entry in left))

    def _recover(self, left: Entry) -> None:
        if left.is_stale(self.sysfs):
            self.journal.remove(left.bdf)
        else:
            log.info("%s was left by process %d, restoring it first", left.bdf, left.pid)
            self.give_back(left)

    def change(self, operation: Operation, wanted: Mapping[Bdf, Setting]) -> list[PciDevice]:
        """Record each device, then bind the wanted driver, of all devices at the same time.

        Once one has failed no other driver is unbound. A driver that was unbound before that is rebound, without its
        state: the addresses of a network interface, for example.

        Returns the devices as they are then, in the same order. Raises ``OSError``, ``HostNotReady``,
        ``NoSuchDevice``; ``NotAssignable`` if vfio-pci does not bind a device, ``RestoreFailed`` if another driver
        does not. After any exception, call :meth:`put_back`.
        """
        to_vfio = any(setting.driver == VFIO_PCI for setting in wanted.values())
        if to_vfio and not self.sysfs.exists(PCI_DRIVERS, VFIO_PCI):
            self.sysfs.load_module(VFIO_PCI)
        entries = [Entry.of(self.sysfs, bdf, operation, setting) for bdf, setting in wanted.items()]
        for other in list(_open):  # of this process: `recover` found no entry of theirs in the journal
            if other.journal.state_dir == self.journal.state_dir:
                other.entries = [entry for entry in other.entries if entry.bdf not in wanted]
        self.entries += entries
        _open.add(self)
        failed = threading.Event()
        return run_together(*(partial(self._change, entry, wanted[entry.bdf], failed) for entry in entries))

    def _change(self, entry: Entry, wanted: Setting, failed: threading.Event) -> PciDevice:
        """Change the device; stop before its driver is unbound if another device has failed."""
        bdf = entry.bdf
        try:
            with device_lock(self.sysfs, bdf, self._timeout) as held:
                self._record(entry, Step.RECORDED)
                if not self._set_driver(entry, wanted, held, unless=failed.is_set):
                    return self.sysfs.device(bdf)  # for nobody: `change` raises
                if entry.operation is Operation.UNBIND:
                    self._set_attributes(entry, wanted)
                    self._record(entry, Step.RETURNED)
                    device = self.sysfs.device(bdf)
                else:
                    device = self.sysfs.device(bdf)
                    wait_for_node(self.sysfs, device, NODE_TIMEOUT)
                    self._record(entry, Step.BOUND)
                self.confirm(bdf, wanted)
                log.debug("%s: %s, before: %s", bdf, wanted, entry.before)
                return device
        except BaseException:
            failed.set()
            raise

    def confirm(self, bdf: Bdf, wanted: Setting) -> None:
        """Check that no other program has changed the driver. Raises ``NotAssignable`` or ``RestoreFailed``."""
        now = self.sysfs.driver(bdf)
        if now != wanted.driver and (wanted.driver != MATCHING or now == VFIO_PCI):
            raise _refused(wanted)(
                f"{bdf} is bound to {now or 'no driver'} now: another program changes its driver, too"
            )

    def commit(self) -> None:
        """Complete the entries in the journal: no device is reverted any more. Raises ``OSError``."""
        for entry in self.entries:
            if entry.operation is Operation.BIND:
                self.journal.keep(entry.bdf)
            else:
                self.journal.remove(entry.bdf)
        self.entries.clear()
        _open.discard(self)

    def put_back(self, error: BaseException | None = None) -> None:
        """Revert what is still changed, of all devices at the same time; idempotent. Tries each even if one fails.

        Raises ``RestoreFailed`` with the devices, ``JournalError``, ``OSError``; if ``error`` is set, they become its
        note. ``entries`` are those that remain changed, whatever is raised.
        """
        if self._pid != os.getpid():
            return
        failed: list[str] = []
        restored: list[Bdf] = []
        try:
            with deferred():
                if self.entries:
                    with self.lock():
                        try:
                            failures = run_together(*(partial(self._try_twice, e, restored) for e in self.entries))
                        finally:  # what another process has borrowed since is not to be restored once more
                            self.entries = [entry for entry in self.entries if entry.bdf not in restored]
                    failed = [why for why in failures if why]
            if failed:
                raise RestoreFailed(f"cannot restore {'; '.join(failed)}", RESTORE_HINT)
        except (RestoreFailed, JournalError, OSError) as raised:
            if not isinstance(error, Exception):
                raise
            error.add_note(f"{raised}; {RESTORE_HINT}")
        finally:
            if not self.entries:
                _open.discard(self)

    def give_back(self, entry: Entry) -> str:
        """Restore the setting in the entry, from any state, and remove the entry; idempotent.

        Returns what was done, as text. Raises ``RestoreFailed``, ``OSError``; ``NoSuchDevice`` (after removing the
        entry) if the device was removed.
        """
        try:
            with device_lock(self.sysfs, entry.bdf, self._timeout) as held:
                done = self._give_back(entry, held)
        except NoSuchDevice:
            self._drop(entry)
            raise
        self._record(entry, Step.RETURNED)
        self._drop(entry)
        log.debug("%s: %s", entry.bdf, done)
        return done

    # --- one device, reverted

    def _try_twice(self, entry: Entry, restored: list[Bdf]) -> str | None:
        """Restore the device and append it to ``restored``; or return why that failed twice.

        The second attempt is made from the state that the first has left.
        """
        failure: Exception | None = None
        for _attempt in range(2):
            try:
                if self._is_of_another_process(entry):
                    log.warning("%s was restored, and is changed by another process", entry.bdf)
                else:
                    self.give_back(entry)
            except NoSuchDevice:
                log.warning("%s was removed from this host", entry.bdf)
                restored.append(entry.bdf)
                return None
            except TimeoutError as error:  # once is long enough
                return f"{entry.bdf}: {error.strerror}"
            except Exception as error:
                log.warning("cannot restore %s: %s", entry.bdf, error)
                failure = error
            else:
                restored.append(entry.bdf)
                return None
        return f"{entry.bdf}: {failure}"

    def _is_of_another_process(self, entry: Entry) -> bool:
        """Whether the journal's entry of the device is of another process than ``entry``."""
        try:
            now = self.journal.read(entry.bdf)
        except (JournalError, OSError):  # invalid: this process still knows the setting before
            return False
        return now is not None and (now.pid, now.start_time) != (entry.pid, entry.start_time)

    def _give_back(self, entry: Entry, held: int) -> str:
        bdf = entry.bdf
        now = Setting.of(self.sysfs, bdf)
        if now.driver not in (None, entry.driver, entry.target) and entry.target != MATCHING:
            # Another program has bound it to a third driver since, and may be using it.
            if now.override in (VFIO_PCI, entry.target):
                self._write(override_changes(bdf, now, entry.before))
            return f"bound to {now.driver} by another program, unchanged"
        if entry.operation is Operation.UNBIND and now.driver not in (None, VFIO_PCI):
            uses = usage(Look(self.sysfs), self.sysfs.device(bdf))
            if uses:  # the unbind was almost complete, and the host uses the device already
                self._set_attributes(entry, Setting(now.driver, entry.target_override))
                return f"bound to {now.driver} and in use already, unchanged: {'; '.join(uses)}"
        if now == entry.before and now.driver == VFIO_PCI:
            return "was bound to vfio-pci before, unchanged"
        self._set_driver(entry, entry.before, held)
        self._set_attributes(entry, entry.before)
        return str(entry.before)

    def _drop(self, entry: Entry) -> None:
        self.journal.remove(entry.bdf)
        if entry.operation is Operation.BIND:  # the first may have a record when the last cannot get one
            self.journal.bound.remove(entry.bdf)

    # --- step by step

    def _record(self, entry: Entry, step: Step) -> None:
        entry.step = step
        try:
            self.journal.write(entry)
        except OSError as error:
            if step is Step.RECORDED:
                raise
            # The setting before is in the journal; a full disk must not prevent restoring it.
            log.warning("cannot write the journal entry of %s: %s", entry.bdf, error)
        if self._on_step is not None:
            self._on_step(step, entry.bdf)

    def _set_driver(
        self, entry: Entry, wanted: Setting, held: int, unless: Callable[[], bool] = lambda: False
    ) -> bool:
        """Record each step, make it, and check it. Returns False if ``unless`` has stopped it before the unbinding.

        Raises ``OSError``, ``RestoreFailed``, ``NotAssignable``.
        """
        now = Setting.of(self.sysfs, entry.bdf)
        if now.driver == VFIO_PCI != wanted.driver:
            check_closed(self.sysfs, entry.bdf)
        for change in driver_changes(entry.bdf, now, wanted):
            if change.step not in PROBES and unless():  # once it is unbound, binding is the shortest way
                return False
            self._record(entry, change.step)
            refusal: OSError | None = None
            try:
                timeout = self._timeout if change.may_wait else None
                self.sysfs.write(self.sysfs.path(change.path), f"{change.text}\n", timeout, held)
            except OSError as error:
                if isinstance(error, TimeoutError) or not change.may_wait:
                    raise
                refusal = error  # the driver link shows whether it worked: another program may have done it
            if change.step in UNBINDS:
                self._check_unbound(entry.bdf, now.driver, refusal)
            elif change.step in PROBES:
                self._check_bound(entry.bdf, wanted, refusal, held)
        return True

    def _set_attributes(self, entry: Entry, wanted: Setting) -> None:
        """Set override and power settings after the driver is bound. Raises ``OSError``, ``RestoreFailed``."""
        bdf = entry.bdf
        changes = list(override_changes(bdf, Setting.of(self.sysfs, bdf), wanted))
        if changes:
            self._record(entry, Step.RETURN_OVERRIDE)
            self._write(changes)
        self._record(entry, Step.RETURN_POWER)
        self._write(power_changes(bdf, Setting.of(self.sysfs, bdf), wanted))
        now = Setting.of(self.sysfs, bdf)
        if wanted.driver not in (now.driver, MATCHING) or now.override != wanted.override:
            raise RestoreFailed(f"{bdf} has driver {now.driver or 'none'} and override {now.override or 'none'}")

    def _write(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self.sysfs.write(self.sysfs.path(change.path), f"{change.text}\n")

    # --- checked

    def _check_unbound(self, bdf: Bdf, driver: str | None, refusal: OSError | None) -> None:
        now = self.sysfs.driver(bdf)
        if now == driver:
            raise refusal or RestoreFailed(f"{bdf} is still bound to {driver}")
        if now is not None:
            raise RestoreFailed(f"{bdf} was rebound from {driver} to {now}: another program changes its driver, too")

    def _check_bound(self, bdf: Bdf, wanted: Setting, refusal: OSError | None, held: int) -> None:
        """Check that the wanted driver is bound; bind it if probing did not. ``MATCHING``: any but vfio-pci."""
        driver = wanted.driver or MATCHING
        now = self._await_driver(bdf, 0.2)
        if driver == MATCHING:
            if now == VFIO_PCI:
                device = self.sysfs.device(bdf)
                raise RestoreFailed(
                    f"vfio-pci has bound {bdf} again: its IDs are among those of vfio-pci",
                    f"echo {device.vendor:04x} {device.device:04x} > /sys/bus/pci/drivers/vfio-pci/remove_id, "
                    "or remove vfio-pci.ids from the kernel's command line or from modprobe.d",
                )
            return
        if now is None:
            try:
                self.sysfs.write(self.sysfs.path(PCI_DRIVERS, driver, "bind"), f"{bdf}\n", self._timeout, held)
            except TimeoutError:
                raise
            except OSError as error:  # has the reason; that of the probe does not
                refusal = error
            now = self._await_driver(bdf, NODE_TIMEOUT)
        if now == driver:
            return
        kind = _refused(wanted)
        if now is not None:
            raise kind(f"{bdf} was bound to {now} instead of {driver}: another program changes its driver, too")
        if not self.sysfs.exists(PCI_DRIVERS, driver):
            raise kind(f"{bdf} cannot be bound to {driver}: this kernel has no such driver now", "load its module")
        raise kind(
            f"{driver} does not bind {bdf}: it has no driver now"
            + (f" ({refusal.strerror or refusal})" if refusal else ""),
            f"see the kernel's log: dmesg | grep {bdf}",
        )

    def _await_driver(self, bdf: Bdf, seconds: float) -> str | None:
        # Probing is complete when the write returns, except for drivers that probe asynchronously.
        wait_until(lambda: self.sysfs.driver(bdf) is not None or not self.sysfs.device_path(bdf).exists(), seconds)
        return self.sysfs.driver(bdf)


def _refused(wanted: Setting) -> type[KvmpassError]:
    return NotAssignable if wanted.driver == VFIO_PCI else RestoreFailed


_open: set[Transaction] = set()


def _put_back_open() -> None:
    # An interrupt can arrive between the last statement of a `with` block and the first of `__exit__`.
    for transaction in list(_open):
        try:
            transaction.put_back()
        except (KvmpassError, OSError) as error:
            log.error("%s; %s", error, RESTORE_HINT)


atexit.register(_put_back_open)
