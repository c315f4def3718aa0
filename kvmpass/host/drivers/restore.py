"""Restore devices that killed processes have left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from kvmpass._dataclass import dataclass
from kvmpass._signals import deferred
from kvmpass._together import run_together
from kvmpass.errors import BadAddress, JournalError, KvmpassError, NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.drivers.journal import Entries, Entry, Journal
from kvmpass.host.drivers.lock import Say
from kvmpass.host.drivers.transaction import DRIVER_TIMEOUT, OnStep, Transaction
from kvmpass.host.kernel.processes import Process
from kvmpass.host.sysfs import VFIO_PCI, Sysfs

RestoreOutcome = Literal["restored", "stale", "owner-alive", "corrupt", "gone", "failed"]


@dataclass(frozen=True, slots=True)
class Restored:
    """The result for one entry of the journal."""

    bdf: str
    """The device's address; the file's name without suffix if the entry is ``corrupt``."""
    outcome: RestoreOutcome
    """See :func:`restore`."""
    detail: str
    """What was done, or why not."""
    operation: str | None = None
    """``assign``, ``bind``, ``unbind``: interrupted; ``bound``: a completed bind; None if unknown."""


def restore(
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    timeout: float = DRIVER_TIMEOUT,
    say: Say | None = None,
    on_step: OnStep | None = None,
) -> list[Restored]:
    """Rebind the devices that killed processes have left to their drivers: one result for each, by address.

    They are rebound at the same time, each in a thread of its own, from which ``on_step`` is called.

    ``restored``: as before the operation; ``stale``: of another boot or device, removed; ``owner-alive``: borrowed by
    a running process, unchanged; ``corrupt``: invalid, renamed; ``gone``: the device was removed, and so is the
    entry; ``failed``: the entry stays, try again. A device whose bind is complete stays bound; of such records only
    those that are stale, corrupt or of a removed device are reported, after the others. Idempotent. ``say`` receives
    a line when another process changes drivers for longer than a second. Raises ``PermissionError``,
    ``NotADirectoryError`` (as ``Journal.check``), ``JournalError`` (that process does not end).
    """
    sysfs = sysfs or Sysfs()
    journal = Journal(state_dir)
    journal.check()
    try:
        if not any(entries.files() or entries.scratch() for entries in (journal, journal.bound)):
            return []
        with journal.lock(say), deferred():
            for path in [*journal.scratch(), *journal.bound.scratch()]:
                path.unlink(missing_ok=True)
            transaction = Transaction(sysfs, journal, timeout, say, on_step)
            restore_one = partial(_restore_one, transaction)
            results = run_together(*(partial(_safely, path, restore_one) for path in journal.files()))
            results += [_safely(path, partial(_check_record, sysfs, journal)) for path in journal.bound.files()]
            return [result for result in results if result is not None]
    except PermissionError as error:
        if not getattr(error, "__notes__", None):
            error.add_note("run as root: this changes drivers of devices")
        raise


def orphaned(sysfs: Sysfs, state_dir: Path | None = None) -> list[Bdf]:
    """Return the devices that :func:`restore` would restore, by address. Only reads.

    Only root may read the journal: for other users the list is empty.
    """

    def is_orphaned(entry: Entry) -> bool:
        if entry.is_stale(sysfs) or entry.has_living_owner(sysfs):
            return False
        return sysfs.device_path(entry.bdf).exists()

    return [entry.bdf for entry in Journal(state_dir).find(is_orphaned)]


def _safely(path: Path, work: Callable[[Path], Restored | None]) -> Restored | None:
    """Turn an error into a result, so that the other entries are processed."""
    try:
        return work(path)
    except OSError as error:
        detail = f"{error.filename or path}: {error.strerror or error}"
    except Exception as error:
        detail = f"{path}: {type(error).__name__}: {error}"
    return Restored(path.stem, "failed", detail)


def _read(entries: Entries, path: Path, operation: str | None = None) -> Entry | Restored:
    """Return the entry in a file, or the result for one that is invalid or has lost its text."""
    try:
        bdf = Bdf.parse(path.stem)
        if str(bdf) != path.stem:
            raise BadAddress(f"{path} is not named after a full address")
        entry = entries.read(bdf)
    except (BadAddress, JournalError) as error:
        aside = entries.set_aside(path)
        return Restored(path.stem, "corrupt", f"{error}; renamed to {aside.name}")
    if entry is not None:
        return entry
    entries.remove(bdf)
    return Restored(path.stem, "stale", "emptied when another boot ended: nothing to do", operation)


def _restore_one(transaction: Transaction, path: Path) -> Restored:
    sysfs, journal = transaction.sysfs, transaction.journal
    entry = _read(journal, path)
    if isinstance(entry, Restored):
        return entry
    name, operation = str(entry.bdf), entry.operation.value
    if entry.is_stale(sysfs):
        journal.remove(entry.bdf)
        why = "of another device at that address" if entry.is_of_another(sysfs) else "of another boot"
        return Restored(name, "stale", f"{why}: its bindings no longer exist, nothing to do", operation)
    if entry.is_owned(sysfs):
        return Restored(name, "owner-alive", f"in use by {Process(entry.pid, entry.command)}", operation)
    try:
        return Restored(name, "restored", transaction.give_back(entry), operation)
    except NoSuchDevice:
        return Restored(name, "gone", "the device was removed", operation)
    except OSError as error:
        detail = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
        return Restored(name, "failed", detail, operation)
    except KvmpassError as error:
        return Restored(name, "failed", str(error), operation)


def _check_record(sysfs: Sysfs, journal: Journal, path: Path) -> Restored | None:
    """Remove the record of a binding that no longer exists; None if there is nothing to report."""
    record = _read(journal.bound, path, "bound")
    if isinstance(record, Restored):
        return record
    result = None
    if record.is_stale(sysfs):
        why = "another device at that address was bound" if record.is_of_another(sysfs) else "bound in another boot"
        result = Restored(str(record.bdf), "stale", f"{why}: its bindings no longer exist", "bound")
    elif not sysfs.device_path(record.bdf).exists():
        result = Restored(str(record.bdf), "gone", "was bound, and was removed", "bound")
    elif sysfs.driver(record.bdf) == VFIO_PCI or journal.path(record.bdf).exists():
        return None
    journal.bound.remove(record.bdf)
    return result
