"""The journal: the drivers of devices before a change, in files.

One JSON file for each device in ``$KVMPASS_STATE_DIR/journal`` (default ``/var/lib/kvmpass/journal``) while its
driver is being changed, or while it is borrowed. A file is replaced atomically (rename(2)). An entry belongs to a
boot, because bindings do not survive one, and to a process: while a borrower runs, no other process changes the
device. The entry of a completed bind moves to the directory ``bound``: the record for a later unbind.

Nothing is synced: an entry is for other processes of its boot, which read it from the page cache. What a power
failure leaves of a file is of an earlier boot. A write error of the disk may go unnoticed, and the entry be
lost once the page cache drops it. A state directory in /run, a tmpfs, has no such errors, and entries are of no use
after their boot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Self

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import BadAddress, DeviceInUse, JournalError, KvmpassError, NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.drivers.changes import ON_VFIO_PCI, Setting, Step
from kvmpass.host.drivers.lock import HostLock, Say
from kvmpass.host.kernel.processes import Process, process, start_time
from kvmpass.host.sysfs import VFIO_PCI, PciDevice, Sysfs

SCHEMA = 1


class Operation(StrEnum):
    """The operation that has written an entry."""

    ASSIGN = "assign"  # borrowed: the entry stays for as long as the owner has the device
    BIND = "bind"
    UNBIND = "unbind"


# Drivers' names become paths: no slash, nothing hidden, nothing that UTF-8 cannot say.
_NAME = lazy_pattern(r"(?!\.)[^/\x00-\x1f\ud800-\udfff]{1,100}")


@dataclass(slots=True)
class Entry:
    """The entry of one device."""

    bdf: Bdf
    """The device."""
    boot_id: str
    """The boot in which it was written."""
    pid: int
    """The owner: the process that has written it."""
    start_time: int
    """The owner's start time, in clock ticks since boot."""
    command: str
    """The owner's name (``comm``)."""
    driver: str | None
    """The driver before the operation; None without one."""
    override: str | None
    """``driver_override`` before."""
    power_control: str | None
    """``power/control`` before."""
    d3cold_allowed: str | None
    """``d3cold_allowed`` before."""
    step: Step = Step.RECORDED
    """The last step that was begun."""
    operation: Operation = Operation.ASSIGN
    """The operation."""
    target: str | None = VFIO_PCI
    """The driver that the operation binds; ``*``: whichever matches."""
    target_override: str | None = VFIO_PCI
    """``driver_override`` after the operation."""
    ids: str | None = None
    """``vendor:device:subvendor:subdevice``; None in entries of older versions."""

    @classmethod
    def of(
        cls, sysfs: Sysfs, bdf: Bdf, operation: Operation = Operation.ASSIGN, target: Setting = ON_VFIO_PCI
    ) -> Self:
        """Return an entry for the device as it is now, owned by this process. Raises ``NoSuchDevice``."""
        pid = os.getpid()
        device = sysfs.device(bdf)
        now = Setting.of(sysfs, bdf)
        return cls(
            bdf=bdf,
            boot_id=boot_id(sysfs),
            pid=pid,
            start_time=start_time(sysfs, pid) or 0,
            command=process(sysfs, pid).name,
            driver=now.driver,
            override=now.override,
            power_control=now.power_control,
            d3cold_allowed=now.d3cold_allowed,
            operation=operation,
            target=target.driver,
            target_override=target.override,
            ids=_ids(device),
        )

    @property
    def before(self) -> Setting:
        """The setting before the operation."""
        return Setting(self.driver, self.override, self.power_control, self.d3cold_allowed)

    def to_json(self) -> str:
        """Return the entry as JSON text."""
        import json

        fields = {name: getattr(self, name) for name in self.__match_args__}
        return json.dumps({"schema": SCHEMA, **fields, "bdf": str(self.bdf)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse JSON text. Raises ``ValueError`` with the reason."""
        import json

        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError(f"not an entry of schema {SCHEMA}")
        for name, kind in (("boot_id", str), ("command", str), ("pid", int), ("start_time", int)):
            if not isinstance(content.get(name), kind):
                raise ValueError(f"no valid {name}")
        for name in ("driver", "override", "power_control", "d3cold_allowed", "target", "target_override", "ids"):
            word = content.get(name)
            if word is not None and not (isinstance(word, str) and _NAME.fullmatch(word)):
                raise ValueError(f"invalid {name}: {word!a}")
        try:
            content["bdf"] = Bdf.parse(str(content.get("bdf")))
            content["step"] = Step(str(content.get("step")))
            content["operation"] = Operation(str(content.get("operation", Operation.ASSIGN)))
            return cls(**content)
        except (BadAddress, TypeError) as error:
            raise ValueError(str(error)) from None

    def is_stale(self, sysfs: Sysfs) -> bool:
        """Whether it is of an earlier boot or of a device that was replaced: its binding no longer exists."""
        return self.boot_id != boot_id(sysfs) or self.is_of_another(sysfs)

    def is_of_another(self, sysfs: Sysfs) -> bool:
        """Whether another device is at that address now."""
        try:
            return self.ids not in (None, _ids(sysfs.device(self.bdf)))
        except NoSuchDevice:
            return False

    def is_owned(self, sysfs: Sysfs) -> bool:
        """Whether the process that borrowed the device still runs (not another one with its PID).

        Call under the lock. ``bind`` and ``unbind`` hold it from the first change to the last: an entry of theirs
        that is found under the lock was left, even if the process still runs.
        """
        borrowed = self.operation is Operation.ASSIGN and not self.is_stale(sysfs)
        return borrowed and self.has_living_owner(sysfs)

    def has_living_owner(self, sysfs: Sysfs) -> bool:
        """Whether the process that has written the entry still runs. The entry must be of this boot."""
        return start_time(sysfs, self.pid) == self.start_time


def _ids(device: PciDevice) -> str:
    numbers = (device.vendor, device.device, device.subsystem_vendor, device.subsystem_device)
    return ":".join(f"{number:04x}" for number in numbers)


def boot_id(sysfs: Sysfs) -> str:
    """Return the ID of this boot (random(4)). Raises ``JournalError`` without one."""
    text = sysfs.text("proc/sys/kernel/random/boot_id")
    if not text:
        raise JournalError("this host has no boot_id (/proc/sys/kernel/random/boot_id)")
    return text


def _boot_time() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def default_state_dir() -> Path:
    """Return the absolute path ``$KVMPASS_STATE_DIR``, or ``/var/lib/kvmpass``."""
    # A process may change its working directory before it rebinds a device.
    return Path(os.environ.get("KVMPASS_STATE_DIR") or "/var/lib/kvmpass").absolute()


class Entries:
    """A directory of entries, one file for each device.

    Synchronization: changes under the lock of :class:`Journal` only; reading is safe at any time.
    """

    def __init__(self, directory: Path, what: str) -> None:
        self.directory = directory
        self._what = what

    def path(self, bdf: Bdf) -> Path:
        """Return the file of a device's entry, which need not exist."""
        return self.directory / f"{bdf}.json"

    def write(self, entry: Entry) -> None:
        """Write the entry, atomically (rename(2)). Raises ``OSError``."""
        path = self.path(entry.bdf)
        scratch = path.with_suffix(".tmp")
        try:
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(entry.to_json().encode())
            scratch.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = str(path)  # a failed write names nothing
                error.add_note("free some space there, or set KVMPASS_STATE_DIR to another directory")
                with contextlib.suppress(OSError):
                    scratch.unlink(missing_ok=True)
            raise

    def read(self, bdf: Bdf) -> Entry | None:
        """Return the entry of a device; None without one, or if a power failure or a panic has taken its text.

        That has left a file without text which is older than this boot. Raises ``JournalError`` for an invalid file.
        """
        path = self.path(bdf)
        try:
            content = path.read_bytes()
            if not content.strip(b"\0") and path.stat().st_mtime < _boot_time():
                return None
        except FileNotFoundError:
            return None
        try:
            entry = Entry.from_json(content.decode())
            if entry.bdf != bdf:
                raise ValueError(f"it refers to {entry.bdf}")
        except ValueError as error:
            raise JournalError(
                f"the {self._what} {path} cannot be read: {error}",
                "kvmpass restore renames it; check the device's driver before using the device",
            ) from None
        return entry

    def find(self, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """Return the entries for which ``wanted`` is true, by address, without those that cannot be read."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.files():
                with contextlib.suppress(KvmpassError, OSError):
                    entry = self.read(Bdf.parse(path.stem))
                    if entry is not None and wanted(entry):
                        found.append(entry)
        return found

    def remove(self, bdf: Bdf) -> None:
        """Remove the entry of a device, if there is one. Raises ``OSError``."""
        self.path(bdf).unlink(missing_ok=True)

    def set_aside(self, path: Path) -> Path:
        """Rename an invalid entry so that it is ignored; return its new path. Raises ``OSError``."""
        aside = path.with_suffix(".corrupt")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_suffix(f".corrupt-{number}")
        path.rename(aside)
        return aside

    def files(self) -> list[Path]:
        """Return the files of entries, by name; empty without a directory. Raises ``PermissionError``."""
        try:
            return sorted(path for path in self.directory.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return []

    def scratch(self) -> list[Path]:
        """Return the temporary files of processes killed in :meth:`write`; remove them under the lock only."""
        return sorted(self.directory.glob("*.tmp"))


class Journal(Entries):
    """The entries of a host, the records of completed bindings, and the lock under which drivers change."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self.state_dir = default_state_dir() if state_dir is None else Path(state_dir)
        super().__init__(self.state_dir / "journal", "journal entry")
        self.bound = Entries(self.state_dir / "bound", "record of the bound device")
        self._lock = HostLock(self.state_dir / "lock")

    @contextlib.contextmanager
    def lock(self, say: Say | None = None) -> Iterator[None]:
        """Hold the lock for changes of drivers on this host; see :meth:`HostLock.hold`. Raises as ``check`` does."""
        self.check()
        with self._lock.hold(say):
            for entries in (self, self.bound):
                entries.directory.mkdir(mode=0o755, exist_ok=True)
            yield

    def check(self) -> None:
        """Check the journal's directories. Raises ``NotADirectoryError`` if a file is in the place of one."""
        own = (self.state_dir, self.directory, self.bound.directory)
        for place in map(str, (*reversed(self.state_dir.parents), *own)):
            if os.path.lexists(place) and not os.path.isdir(place):  # noqa: PTH112 - false where this may not look
                error = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), place)
                error.add_note(
                    f"move {place} away, or set KVMPASS_STATE_DIR to another directory than {self.state_dir}"
                )
                raise error

    def read_unowned(self, sysfs: Sysfs, bdf: Bdf) -> Entry | None:
        """Return the entry that a process has left; None without one. Raises as ``read`` does.

        Raises ``DeviceInUse`` for the entry of a running process that has borrowed the device.
        """
        entry = self.read(bdf)
        if entry is not None and entry.is_owned(sysfs):
            raise DeviceInUse(
                f"{bdf} is assigned by {Process(entry.pid, entry.command)}",
                "stop that process first, or choose another device",
            )
        return entry

    def keep(self, bdf: Bdf) -> None:
        """Turn the entry of a completed bind into its record, atomically (rename(2)). Raises ``OSError``."""
        self.path(bdf).rename(self.bound.path(bdf))
