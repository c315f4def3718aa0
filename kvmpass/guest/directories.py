"""Directories of this host that a guest gets: its root, and its shares."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvmpass import files
from kvmpass._dataclass import dataclass
from kvmpass._teardown import undo_on_error
from kvmpass.errors import DaemonError, ShareError
from kvmpass.files.program import INSTALL
from kvmpass.guest.spec import HOST, MINIMAL
from kvmpass.host import Sysfs
from kvmpass.host.kernel.mounts import mounts_of
from kvmpass.initramfs import GuestRoot, init
from kvmpass.initramfs.served import Entry, Served, in_root
from kvmpass.machine import Machine


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory of this host in a guest."""

    source: Path
    """The directory, without symlinks."""
    mount: Served
    """Its place in the guest."""
    user: files.User
    """As whom its files are read and written."""

    def serve(self, machine: Machine) -> None:
        """Start a daemon that serves it to ``machine``, as long as that is open.

        Raises ``ShareError``, ``OSError``, and what ``Machine.add_filesystem`` raises.
        """
        own = [(found.point, found.kind) for found in mounts_of(Sysfs(), "self")]
        hidden = files.covers(str(self.source), own)
        daemon = files.FileDaemon(self.source, self.user, writable=self.mount.writable, covers=hidden)
        with undo_on_error(daemon.close):
            try:
                machine.add_filesystem(self.mount.tag, daemon.connection, daemon.close, daemon.fate)
            except DaemonError as error:
                if said := daemon.fate() or daemon.messages:
                    error.add_note(f"see what is known of virtiofsd: {said}")
                raise


def directories(root: str, shares: Sequence[str]) -> tuple[Directory, ...]:
    """Return what ``--root`` and each ``--share`` denote. Raises ``ShareError``."""
    if (root != MINIMAL or shares) and files.find_daemon() is None:
        raise ShareError("--root and --share need virtiofsd, which was not found", INSTALL)
    found = [] if root == MINIMAL else [_root(root)]
    found += [_share(f"kvmpass.share{number}", text, root) for number, text in enumerate(shares)]
    targets = [directory.mount.target for directory in found]
    for target in targets:
        if targets.count(target) > 1:
            raise ShareError(f"--share: two directories for {target} in the guest", "give one another DST")
    return tuple(found)


def _root(root: str) -> Directory:
    source = Path("/") if root == HOST else _existing(root, "--root")
    if not any(os.path.lexists(source / place) for place in ("bin/sh", "usr/bin/sh")):
        raise ShareError(
            f"--root: {source} has no bin/sh: it is not the root of a Linux system",
            f"name such a directory, made by debootstrap for example, or {HOST} for this host's own root",
        )
    return Directory(source, Served("kvmpass.root", "/"), files.caller())


def _share(tag: str, text: str, root: str) -> Directory:
    spec, comma, access = text.rpartition(",")
    writable = bool(comma) and access == "rw"
    if not writable:
        spec = text
    name, colon, target = spec.rpartition(":")
    if not colon or not target.startswith("/"):
        name, target = spec, os.path.abspath(spec)  # noqa: PTH100 - the path as it was written, with its symlinks
    target = os.path.normpath(target)
    if target == "/":
        raise ShareError(f"--share {text!r}: / is the guest's root", "give it with --root, or share it with a DST")
    source = _existing(name, "--share")
    if root != MINIMAL:
        target = in_root(Path("/") if root == HOST else Path(root).resolve(), target)
    user = _writer(source) if writable else files.caller()
    return Directory(source, Served(tag, target, writable), user)


def _writer(source: Path) -> files.User:
    """Return as whom files of ``source`` are written: its owner, if this process may choose; never root."""
    if os.geteuid() == 0:
        user = files.owner(source.stat())
        if user is None:
            raise ShareError(
                f"--share: {source} belongs to root, and nothing is written as root for a guest",
                f"give it to a user: chown USER {source}",
            )
        return user
    if not os.access(source, os.W_OK | os.X_OK):
        raise ShareError(
            f"--share: this user may not write to {source}", "give --share a directory of your own, or leave out ,rw"
        )
    return files.caller()


def _existing(name: str, option: str) -> Path:
    if not name:  # as a path it is the current directory, which an unset variable must not give away
        raise ShareError(f"{option}: the name of the directory is empty", "name it: . is the current directory")
    try:
        source = Path(name).resolve(strict=True)
    except OSError as error:
        raise ShareError(f"{option}: {name}: {error.strerror}") from error
    except RuntimeError as error:
        raise ShareError(f"{option}: {name}: {error}") from error
    if not source.is_dir():
        raise ShareError(f"{option}: {source} is not a directory", "use --copy to copy a file into the guest")
    return source


def entry(directory: Directory, root: str, environment: Mapping[str, str] = os.environ) -> Entry:
    """Return how programs start in ``directory``, the guest's root.

    In this host's root a program finds what it would find on the host: the directory and ``PATH`` of this process,
    and the home of the user as whom the files are read.
    """
    if root != HOST:
        shell = next(name for name in ("/bin/bash", "/bin/sh", "/usr/bin/sh") if _has(directory.source, name))
        home = "/root" if (directory.source / "root").is_dir() else "/"
        return Entry(directory=home, home=home, shell=shell)
    path = environment.get("PATH", "").split(":")
    path += [place for place in init.PATH.split(":") if place not in path]
    shell = environment.get("SHELL", "")
    return Entry(
        directory=str(Path.cwd()),
        home=directory.user.home if directory.user.home and Path(directory.user.home).is_dir() else "/root",
        path=":".join(filter(None, path)),
        shell=shell if shell.startswith("/") and Path(shell).exists() else "/bin/sh",
    )


def _has(root: Path, name: str) -> bool:
    return os.path.lexists(root / name.lstrip("/"))


def mount(guest: GuestRoot, root: str, served: Sequence[Directory]) -> Entry | None:
    """Let the initramfs mount ``served``, one of which is ``root`` unless that is ``MINIMAL``.

    Return how programs start in that root; None: in the initramfs.
    """
    mounts, first = [directory.mount for directory in served], served[0]
    if root == MINIMAL:
        guest.serve(mounts)
        return None
    start = entry(first, root)
    if root == HOST:
        contents = {"/etc/resolv.conf": data} if (data := name_servers()) else {}
        # What only root could read, and nobody here is root.
        guest.serve(mounts, first.source, start, empty=["/root"], contents=contents)
    else:
        guest.serve(mounts, first.source, start)
    return start


def name_servers() -> bytes:
    """Return this host's resolv.conf(5): the file may be below /run, of which the guest has its own.

    Where a service on this host answers, the one that lists the servers that it asks.
    """
    for path in (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")):
        with suppress(OSError):
            data = path.read_bytes()
            if b"127.0.0.53" not in data:
                return data
    return b""
