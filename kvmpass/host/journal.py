"""The journal of borrowed devices: what was there before, on disk, before anything is changed.

One JSON file for each device in ``$KVMPASS_STATE_DIR/journal`` (default ``/var/lib/kvmpass/journal``). A file is
replaced in one step, so a reader finds the old or the new text and never half of one. An entry belongs to a boot
(bindings vanish with it) and to a process (while that lives, nobody else touches the device).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from kvmpass.errors import BadAddress, JournalError
from kvmpass.host.address import Bdf
from kvmpass.host.processes import process, start_time
from kvmpass.host.sysfs import Sysfs

SCHEMA = 1
LOCK_TIMEOUT = 90.0  # seconds: longer than one holder's worst case for a device or two


class Step(StrEnum):
    """What an owner is about to do when the entry says so. Undoing looks at the device, not at the step."""

    RECORDED = "recorded"
    OVERRIDE = "override"
    UNBIND = "unbind"
    PROBE = "probe"
    BOUND = "bound"
    RETURN_UNBIND = "return-unbind"
    RETURN_PROBE = "return-probe"
    RETURN_OVERRIDE = "return-override"
    RETURN_POWER = "return-power"
    RETURNED = "returned"


@dataclass(slots=True)
class Entry:
    """One borrowed device. ``driver``, ``override``, ``power_control`` and ``d3cold_allowed`` are what was there."""

    bdf: Bdf
    boot_id: str
    pid: int
    start_time: int
    command: str
    driver: str | None
    override: str | None
    power_control: str | None
    d3cold_allowed: str | None
    step: Step = Step.RECORDED

    @classmethod
    def of(cls, sysfs: Sysfs, bdf: Bdf) -> Self:
        """Look at the device; this process becomes the owner."""
        pid = os.getpid()
        device = sysfs.device(bdf)
        base = sysfs.device_path(bdf)
        return cls(
            bdf=bdf,
            boot_id=boot_id(sysfs),
            pid=pid,
            start_time=start_time(sysfs, pid) or 0,
            command=process(sysfs, pid).name,
            driver=device.driver,
            override=device.driver_override,
            power_control=sysfs.text(str(base / "power/control")),
            d3cold_allowed=sysfs.text(str(base / "d3cold_allowed")),
        )

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self), "bdf": str(self.bdf)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ``ValueError`` with what is wrong."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError(f"not an entry of schema {SCHEMA}")
        optional = ("driver", "override", "power_control", "d3cold_allowed")
        for name, kind in (("boot_id", str), ("command", str), ("pid", int), ("start_time", int)):
            if not isinstance(content.get(name), kind):
                raise ValueError(f"no valid {name}")
        if not all(name in content and isinstance(content[name], str | None) for name in optional):
            raise ValueError("no valid record of what was there")
        try:
            content["bdf"] = Bdf.parse(str(content.get("bdf")))
            content["step"] = Step(str(content.get("step")))
            return cls(**content)
        except (BadAddress, TypeError) as error:
            raise ValueError(str(error)) from None

    def is_stale(self, sysfs: Sysfs) -> bool:
        """Written before the last reboot: the binding it speaks of is gone."""
        return self.boot_id != boot_id(sysfs)

    def owner_lives(self, sysfs: Sysfs) -> bool:
        """Whether the very process that wrote the entry still runs (not another one with its number)."""
        return not self.is_stale(sysfs) and start_time(sysfs, self.pid) == self.start_time


def boot_id(sysfs: Sysfs) -> str:
    text = sysfs.text("proc/sys/kernel/random/boot_id")
    if not text:
        raise JournalError("this host tells no boot_id (/proc/sys/kernel/random/boot_id)")
    return text


def default_state_dir() -> Path:
    return Path(os.environ.get("KVMPASS_STATE_DIR") or "/var/lib/kvmpass")


class Journal:
    """The entries of a host, and the lock under which drivers change."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self.state_dir = default_state_dir() if state_dir is None else Path(state_dir)
        self.directory = self.state_dir / "journal"

    def path(self, bdf: Bdf) -> Path:
        return self.directory / f"{bdf}.json"

    @contextlib.contextmanager
    def lock(self, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
        """One process at a time changes drivers on this host. Raises ``JournalError`` after ``timeout`` seconds."""
        try:
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(self.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except PermissionError as error:
            error.add_note("run as root: taking and giving back devices changes drivers")
            raise
        try:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise JournalError(
                            f"another kvmpass has been changing drivers for {timeout:g} s "
                            f"(lock {self.state_dir / 'lock'})",
                            "see what hangs: ps, dmesg; then try again",
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)

    def write(self, entry: Entry) -> None:
        """Put the entry on disk, old or new but never half (rename(2)). Raises ``OSError``."""
        path = self.path(entry.bdf)
        scratch = path.with_suffix(".tmp")
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, entry.to_json().encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        scratch.rename(path)
        self._sync()

    def read(self, bdf: Bdf) -> Entry | None:
        """The entry of a device, None without one. Raises ``JournalError`` for a text that is no entry."""
        try:
            text = self.path(bdf).read_text()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            text = ""
        try:
            entry = Entry.from_json(text)
            if entry.bdf != bdf:
                raise ValueError(f"it speaks of {entry.bdf}")
        except ValueError as error:
            raise JournalError(
                f"the journal entry {self.path(bdf)} cannot be read: {error}",
                "kvmpass restore puts it aside; look at the device's driver before it is used again",
            ) from None
        return entry

    def remove(self, bdf: Bdf) -> None:
        self.path(bdf).unlink(missing_ok=True)
        self._sync()

    def set_aside(self, path: Path) -> Path:
        """Keep an unreadable entry under a name that is not looked at again."""
        aside = path.with_suffix(".corrupt")
        path.rename(aside)
        self._sync()
        return aside

    def files(self) -> list[Path]:
        """The entries' files, by name; empty without a journal. Raises ``PermissionError``."""
        try:
            return sorted(path for path in self.directory.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return []

    def scratch(self) -> list[Path]:
        """What processes killed in :meth:`write` left; only to be removed under the lock."""
        return sorted(self.directory.glob("*.tmp"))

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
