"""Borrow devices from the host for a while, and give back what a killed process has left."""

from __future__ import annotations

import atexit
import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from kvmpass._signals import deferred
from kvmpass.errors import BadAddress, DeviceInUse, JournalError, KvmpassError, NoSuchDevice, RestoreFailed
from kvmpass.host.address import Bdf
from kvmpass.host.binding import DRIVER_TIMEOUT, Binder
from kvmpass.host.checks import check_assignable
from kvmpass.host.journal import Entry, Journal
from kvmpass.host.processes import Process
from kvmpass.host.sysfs import PCI_DRIVERS, PciDevice, Sysfs
from kvmpass.host.usage import VFIO_PCI

log = logging.getLogger(__name__)

RESTORE_HINT = "kvmpass restore tries again"


class Borrow:
    """Devices of the host on vfio-pci for as long as the ``with`` block runs. Made by :func:`borrow`.

    Used once, by one thread; in the main thread Ctrl-C, SIGTERM and SIGHUP wait while a device is between
    two drivers (tens to hundreds of milliseconds; a driver that hangs is given up after ``timeout`` seconds).
    """

    def __init__(self, bdfs: tuple[Bdf, ...], sysfs: Sysfs, journal: Journal, timeout: float) -> None:
        self.bdfs = bdfs
        self.devices: list[PciDevice] = []
        self._sysfs = sysfs
        self._journal = journal
        self._binder = Binder(sysfs, journal, timeout)
        self._entries: list[Entry] = []
        self._pid = os.getpid()

    def __enter__(self) -> list[PciDevice]:
        """Take the devices, all or none. Returns them as they are now, in the order of the arguments.

        Raises what :func:`check_assignable` raises, before any change; ``PermissionError``; ``HostNotReady``,
        ``NotAssignable``, ``OSError``, ``JournalError`` after everything has been given back.
        """
        for bdf in self.bdfs:
            check_assignable(self._sysfs, bdf, together=self.bdfs)
            self._check_privilege(bdf)
        self.devices.clear()
        _outstanding.add(self)
        try:
            with self._journal.lock(), deferred():
                for bdf in self.bdfs:
                    self._clear_way(bdf)
                if not self._sysfs.path(PCI_DRIVERS, VFIO_PCI).is_dir():
                    self._sysfs.load_module("vfio-pci")
                for bdf in self.bdfs:
                    entry = Entry.of(self._sysfs, bdf)
                    self._entries.append(entry)
                    self.devices.append(self._binder.take(entry))
            return list(self.devices)
        except BaseException as error:
            self._unwind(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give all devices back. Raises ``RestoreFailed``; with an error under way that becomes its note."""
        self._unwind(error)

    def close(self) -> None:
        """Give back what is still borrowed; twice is harmless. Raises ``RestoreFailed`` naming the devices."""
        if self._pid != os.getpid():  # a fork: the parent's to give back
            return
        failed: list[str] = []
        with deferred():
            if self._entries:
                with self._journal.lock():
                    for entry in reversed(self._entries[:]):
                        problem = self._return(entry)
                        if problem is None:
                            self._entries.remove(entry)
                        else:
                            failed.append(problem)
            if not self._entries:
                _outstanding.discard(self)
        if failed:
            raise RestoreFailed(f"could not give back {'; '.join(failed)}", RESTORE_HINT)

    def _return(self, entry: Entry) -> str | None:
        problem: Exception | None = None
        for _attempt in range(2):  # from whatever state the first one left
            try:
                self._binder.give_back(entry)
            except NoSuchDevice:
                log.warning("%s has gone from this host while it was borrowed", entry.bdf)
                return None
            except TimeoutError as error:  # once is long enough
                return f"{entry.bdf}: {error.strerror}"
            except Exception as error:
                log.warning("giving back %s: %s", entry.bdf, error)
                problem = error
            else:
                return None
        return f"{entry.bdf}: {problem}"

    def _unwind(self, error: BaseException | None) -> None:
        try:
            self.close()
        except (RestoreFailed, JournalError, OSError) as failure:
            if not isinstance(error, Exception):
                raise
            error.add_note(f"{failure}; {RESTORE_HINT}")

    def _check_privilege(self, bdf: Bdf) -> None:
        path = self._sysfs.device_path(bdf) / "driver_override"
        if not os.access(path, os.W_OK, effective_ids=True):
            error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            error.add_note("run as root: borrowing a device changes its driver")
            raise error

    def _clear_way(self, bdf: Bdf) -> None:
        """Refuse what a living process has borrowed; give back what a dead one left."""
        left = self._journal.read(bdf)
        if left is None:
            return
        if left.owner_lives(self._sysfs):
            owner = Process(left.pid, left.command)
            raise DeviceInUse(f"{bdf} is assigned by {owner}", "stop that process first, or choose another device")
        if left.is_stale(self._sysfs):
            self._journal.remove(bdf)
        else:
            log.info("%s was left by process %d, giving it back first", bdf, left.pid)
            self._binder.give_back(left)


_outstanding: set[Borrow] = set()


def _close_outstanding() -> None:
    # An interrupt can strike between the last statement of a `with` block and the first of `__exit__`.
    for one in list(_outstanding):
        try:
            one.close()
        except (KvmpassError, OSError) as error:
            log.error("%s; %s", error, RESTORE_HINT)


atexit.register(_close_outstanding)


def borrow(
    *bdfs: Bdf | str, sysfs: Sysfs | None = None, state_dir: Path | None = None, timeout: float = DRIVER_TIMEOUT
) -> Borrow:
    """Have devices on vfio-pci for a while: ``with host.borrow("0000:01:00.0") as [device]: …``.

    Only these functions change, never their siblings. Before each change the journal (``state_dir``, default
    ``$KVMPASS_STATE_DIR`` or ``/var/lib/kvmpass``) says on disk what was there. On every way out the original driver
    is bound again and the original ``driver_override`` set; :func:`restore` does it for a process that was killed.
    A device that is on vfio-pci already is used as it is and stays there. The module vfio-pci, if it had to be
    loaded, stays loaded. Close all VFIO descriptors of a device before the block ends: the kernel waits for
    them. ``timeout`` is in seconds, for each driver that lets go or takes. What a driver alone remembers
    (addresses of a network interface, for one) is the host's to set again.
    """
    parsed = tuple(Bdf.parse(bdf) if isinstance(bdf, str) else bdf for bdf in bdfs)
    for bdf in parsed:
        if parsed.count(bdf) > 1:
            raise BadAddress(f"{bdf} is named twice", "name each device once")
    return Borrow(parsed, sysfs or Sysfs(), Journal(state_dir), timeout)


Outcome = Literal["restored", "stale", "owner-alive", "corrupt", "gone", "failed"]


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of one journal entry. ``bdf`` is the file's name without suffix where the entry is ``corrupt``."""

    bdf: str
    outcome: Outcome
    detail: str


def restore(
    sysfs: Sysfs | None = None, state_dir: Path | None = None, timeout: float = DRIVER_TIMEOUT
) -> list[Restored]:
    """Give back what processes that were killed have left, one result for each journal entry, by address.

    ``restored``: as it was before; ``stale``: of another boot, dropped without a change; ``owner-alive``: left
    alone; ``corrupt``: unreadable, put aside; ``gone``: no such device any more, dropped; ``failed``: the entry
    stays, try again. Safe to repeat. Raises ``PermissionError``, ``JournalError`` (another process changes drivers).
    """
    sysfs = sysfs or Sysfs()
    journal = Journal(state_dir)
    try:
        if not journal.files() and not journal.scratch():
            return []
        with journal.lock(), deferred():
            for path in journal.scratch():
                path.unlink(missing_ok=True)
            binder = Binder(sysfs, journal, timeout)
            return [_restore_one(sysfs, journal, binder, path) for path in journal.files()]
    except PermissionError as error:
        if not getattr(error, "__notes__", None):
            error.add_note("run as root: giving back devices changes drivers")
        raise


def _restore_one(sysfs: Sysfs, journal: Journal, binder: Binder, path: Path) -> Restored:
    name = path.stem
    try:
        bdf = Bdf.parse(name)
        entry = journal.read(bdf)
    except (BadAddress, JournalError) as error:
        aside = journal.set_aside(path)
        return Restored(name, "corrupt", f"{error}; put aside as {aside.name}")
    if entry is None:
        return Restored(name, "restored", "given back by its owner")
    if entry.is_stale(sysfs):
        journal.remove(bdf)
        return Restored(name, "stale", "of another boot: bindings end with it, nothing to do")
    if entry.owner_lives(sysfs):
        return Restored(name, "owner-alive", f"in use by {Process(entry.pid, entry.command)}")
    try:
        return Restored(name, "restored", binder.give_back(entry))
    except NoSuchDevice:
        return Restored(name, "gone", "there is no such device any more")
    except OSError as error:
        return Restored(name, "failed", f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "))
    except KvmpassError as error:
        return Restored(name, "failed", str(error))
