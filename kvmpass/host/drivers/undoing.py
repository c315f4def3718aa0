"""Changes that are made together and undone together: what borrowing, binding and unbinding share."""

from __future__ import annotations

import atexit
import errno
import logging
import os

from kvmpass._signals import deferred
from kvmpass.errors import DeviceInUse, JournalError, KvmpassError, NoSuchDevice, RestoreFailed
from kvmpass.host.address import Bdf
from kvmpass.host.drivers.binding import Binder
from kvmpass.host.drivers.journal import Entry, Journal, Operation
from kvmpass.host.drivers.lock import Say
from kvmpass.host.drivers.steps import ON_VFIO_PCI, Setting
from kvmpass.host.kernel.processes import Process
from kvmpass.host.sysfs import Sysfs

log = logging.getLogger(__name__)

RESTORE_HINT = "kvmpass restore tries again"


class Undo:
    """The devices that a process has changed and must give back unless it lets go of them. For one thread.

    Changes are made under ``lock()``; ``close`` takes it if need be, and ends what is open at the interpreter's end.
    """

    def __init__(self, sysfs: Sysfs, journal: Journal, timeout: float, say: Say | None = None) -> None:
        self.sysfs = sysfs
        self.journal = journal
        self.binder = Binder(sysfs, journal, timeout)
        self.entries: list[Entry] = []
        self.say = say
        self._pid = os.getpid()

    def begin(self, bdf: Bdf, operation: Operation, target: Setting = ON_VFIO_PCI) -> Entry:
        """Look at the device; from now on it is put back as it is at this moment."""
        entry = Entry.of(self.sysfs, bdf)
        entry.operation, entry.target, entry.target_override = operation, target.driver, target.override
        self.entries.append(entry)
        _outstanding.add(self)
        return entry

    def clear_way(self, bdf: Bdf) -> None:
        """Refuse what a living process has borrowed (``DeviceInUse``); give back what a dead one left."""
        left = self.journal.read(bdf)
        if left is None:
            return
        check_owner(self.sysfs, left)
        if left.is_stale(self.sysfs):
            self.journal.remove(bdf)
        else:
            log.info("%s was left by process %d, giving it back first", bdf, left.pid)
            self.binder.give_back(left)

    def forget(self, entry: Entry) -> None:
        """The entry is not to be undone any more."""
        self.entries.remove(entry)
        if not self.entries:
            _outstanding.discard(self)

    def close(self) -> None:
        """Put back what is still changed; twice is harmless. Raises ``RestoreFailed`` naming the devices."""
        if self._pid != os.getpid():  # a fork: the parent's to give back
            return
        failed: list[str] = []
        with deferred():
            if self.entries:
                with self.journal.lock(self.say):
                    for entry in reversed(self.entries[:]):
                        problem = self._return(entry)
                        if problem is None:
                            self.forget(entry)
                        else:
                            failed.append(problem)
        if failed:
            raise RestoreFailed(f"could not give back {'; '.join(failed)}", RESTORE_HINT)

    def unwind(self, error: BaseException | None) -> None:
        """Close; with an error under way a failure becomes its note."""
        try:
            self.close()
        except (RestoreFailed, JournalError, OSError) as failure:
            if not isinstance(error, Exception):
                raise
            error.add_note(f"{failure}; {RESTORE_HINT}")

    def _return(self, entry: Entry) -> str | None:
        problem: Exception | None = None
        for _attempt in range(2):  # from whatever state the first one left
            try:
                self.binder.give_back(entry)
            except NoSuchDevice:
                log.warning("%s has gone from this host meanwhile", entry.bdf)
                return None
            except TimeoutError as error:  # once is long enough
                return f"{entry.bdf}: {error.strerror}"
            except Exception as error:
                log.warning("giving back %s: %s", entry.bdf, error)
                problem = error
            else:
                return None
        return f"{entry.bdf}: {problem}"


def check_owner(sysfs: Sysfs, entry: Entry) -> None:
    """Raises ``DeviceInUse`` if a living process has borrowed the entry's device."""
    if entry.is_owned(sysfs):
        owner = Process(entry.pid, entry.command)
        raise DeviceInUse(f"{entry.bdf} is assigned by {owner}", "stop that process first, or choose another device")


def check_privilege(sysfs: Sysfs, bdf: Bdf) -> None:
    """Raises ``PermissionError`` where this user may not change the device's driver."""
    if not may_change_driver(sysfs, bdf):
        path = sysfs.device_path(bdf) / "driver_override"
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        error.add_note("run as root: this changes the device's driver")
        raise error


def may_change_driver(sysfs: Sysfs, bdf: Bdf) -> bool:
    return os.access(sysfs.device_path(bdf) / "driver_override", os.W_OK, effective_ids=True)


_outstanding: set[Undo] = set()


def _close_outstanding() -> None:
    # An interrupt can strike between the last statement of a `with` block and the first of `__exit__`.
    for one in list(_outstanding):
        try:
            one.close()
        except (KvmpassError, OSError) as error:
            log.error("%s; %s", error, RESTORE_HINT)


atexit.register(_close_outstanding)
