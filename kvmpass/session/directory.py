"""Where the guests of ``kvmpass start`` are found: a directory for each, which only their user may open."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import DeviceInUse, GuestError, KvmpassError

SOCKET, STATUS, CONSOLE, OLDER_CONSOLE, MESSAGES = "socket", "status.json", "console.log", "console.log.1", "messages"
"""Names of the files in a guest's directory."""
NEWER_CONSOLE = f".{CONSOLE}.new"  # while the log is rotated
_FILES = (SOCKET, STATUS, CONSOLE, OLDER_CONSOLE, NEWER_CONSOLE, MESSAGES, f".{STATUS}")
_NAME = lazy_pattern(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_ADDRESS = lazy_pattern(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")
_MAX_STATUS = 1 << 16
_TRIES, _PAUSE = 10, 0.02  # a reader of a directory holds its lock for a moment


def check_name(name: str) -> str:
    """Return ``name`` if it can be a guest's. Raises ``KvmpassError``."""
    if not _NAME.fullmatch(name):
        raise KvmpassError(
            f"{name!r} cannot be the name of a guest",
            "use at most 64 letters, digits and . _ : - with a letter or digit first",
        )
    return name


def base_directory() -> Path:
    """Return the absolute path of the directory that has those of this user's guests. Raises ``KvmpassError``.

    It need not exist.

    ``$KVMPASS_RUNTIME_DIR``, else ``/run/kvmpass`` for root, ``$XDG_RUNTIME_DIR/kvmpass`` for others.
    """
    if own := os.environ.get("KVMPASS_RUNTIME_DIR"):
        return Path(own).absolute()  # the process of a guest leaves its working directory
    if os.geteuid() == 0:
        return Path("/run/kvmpass")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise KvmpassError(
            "XDG_RUNTIME_DIR is not set: guests are found there", "set it, or KVMPASS_RUNTIME_DIR, to a directory"
        )
    return Path(runtime).absolute() / "kvmpass"


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """A guest, as its process has described it."""

    name: str
    """Its name."""
    pid: int
    """Its process."""
    devices: tuple[str, ...]
    """Addresses of its devices."""
    state: str
    """``starting``, ``running``, ``not answering``, ``stopping``; ``dead`` if its process has ended."""
    since: str
    """When it was started: ISO 8601, UTC; empty: unknown."""


class GuestDirectory:
    """The directory of a guest whose process this is. Made by ``claim``; ``with`` removes it.

    An flock on the directory says that its process lives. Others cannot take part: the mode is 0700.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        """The directory."""
        self._fd = fd

    @classmethod
    def claim(cls, name: str) -> Self:
        """Make the directory of a new guest, in place of a dead one's.

        Raises ``GuestError`` if a guest of that name runs, ``KvmpassError``, ``OSError``.
        """
        path = _own_base() / check_name(name)
        for _ in range(_TRIES):
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
            fd = _lock(path, fcntl.LOCK_EX)
            if fd is not None:
                _empty(fd)
                return cls(path, fd)
            time.sleep(_PAUSE)
        raise GuestError(
            f"a guest {name} runs already", f"stop it (kvmpass stop {name}), or choose another name with --name"
        )

    def write(self, status: GuestStatus) -> None:
        """Write the status document. A reader never sees a part of it."""
        body = {"schema": 2, "command": "guest", **_fields(status)}
        temporary = self.path / f".{STATUS}"
        temporary.write_text(json.dumps(body, indent=2) + "\n")
        temporary.replace(self.path / STATUS)

    @property
    def exists(self) -> bool:
        """Whether it is still found at its path."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # a file of somebody else's in it
            if self.exists:
                _remove(self.path, self._fd)
        os.close(self._fd)


def _own_base() -> Path:
    base = base_directory()
    base.mkdir(0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise KvmpassError(
            f"{base} is not a directory that only this user may write to", "remove it, or set KVMPASS_RUNTIME_DIR"
        )
    return base


def _lock(path: Path, kind: int) -> int | None:
    """Return a descriptor of the directory with its lock; None if its process lives, or it is being replaced."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.lstat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _empty(fd: int) -> None:
    for name in _FILES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=fd)


def _remove(path: Path, fd: int) -> None:
    _empty(fd)
    path.rmdir()


def _fields(status: GuestStatus) -> dict[str, Any]:
    return {
        "name": status.name,
        "pid": status.pid,
        "devices": list(status.devices),
        "state": status.state,
        "since": status.since,
    }


# --- for readers


@contextlib.contextmanager
def _of_this_user() -> Iterator[None]:
    """Add a hint to the error that another user gets."""
    try:
        yield
    except PermissionError as error:
        error.add_note("run it as the user who has started the guest")
        raise


def guests() -> list[GuestStatus]:
    """Return this user's guests by name, dead ones included. Raises ``PermissionError`` for those of another."""
    return [read(path) for path in _directories()]


def _directories() -> Iterator[Path]:
    try:
        with _of_this_user():
            paths = sorted(base_directory().iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (path for path in paths if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def is_dead(path: Path) -> bool:
    """Whether the process of a guest's directory has ended without removing it."""
    fd = _lock(path, fcntl.LOCK_SH)
    if fd is not None:
        os.close(fd)
    return fd is not None


def read(path: Path) -> GuestStatus:
    """Return the status in a guest's directory."""
    try:
        with (path / STATUS).open("rb") as file:
            found = json.loads(file.read(_MAX_STATUS))
        status = GuestStatus(
            path.name, int(found["pid"]), tuple(map(str, found["devices"])), str(found["state"]), str(found["since"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        status = GuestStatus(path.name, 0, (), "starting", "")
    if is_dead(path):
        return GuestStatus(status.name, status.pid, status.devices, "dead", status.since)
    return status


def find(guest: str) -> Path:
    """Return the directory of a guest, by its name or by the address of one of its devices.

    Raises ``GuestError``, ``PermissionError`` for that of another user.
    """
    if _NAME.fullmatch(guest):
        path = base_directory() / guest
        with _of_this_user():
            found = path.is_dir() and not is_dead(path)
        if found:
            return path
    for _, status in holders([guest]):
        return base_directory() / status.name
    raise GuestError(f"no guest {guest!r} runs", "see which do: kvmpass ps")


def holders(addresses: Sequence[str]) -> Iterator[tuple[str, GuestStatus]]:
    """Yield those of these devices that guests of this user have, in full, and the guests."""
    matches = filter(None, (_ADDRESS.fullmatch(address.lower()) for address in addresses))
    wanted = [f"{match[1] or '0000'}:{match[2]}" for match in matches]
    for status in guests() if wanted else ():
        if status.state != "dead":
            yield from ((address, status) for address in wanted if address in status.devices)


def naming_guest(error: DeviceInUse, devices: Sequence[str]) -> DeviceInUse:
    """Return an error that names the guest of this user that has one of the devices; ``error`` if none has."""
    with contextlib.suppress(KvmpassError, OSError):  # no directory for this user's guests
        for device, guest in holders(devices):
            if guest.pid != os.getpid():
                return DeviceInUse(
                    f"{device} is assigned to the guest {guest.name}, process {guest.pid}",
                    f"stop it (kvmpass stop {guest.name}), or choose another device",
                )
    return error


def remove_dead() -> list[str]:
    """Remove the directories of guests whose process was killed; return their names. Their devices: ``restore``."""
    removed = []
    for path in _directories():
        fd = _lock(path, fcntl.LOCK_EX)
        if fd is not None:
            try:
                _remove(path, fd)
                removed.append(path.name)
            except OSError:  # something else is in it
                pass
            finally:
                os.close(fd)
    return removed
