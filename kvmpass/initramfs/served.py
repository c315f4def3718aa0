"""Directories of the host in the guest: what init mounts, and how a program starts in a root that is one of them.

The guest's root is then an overlay in its memory above the host's files, which are read-only. Programs run in it by
``chroot``; init stays in the initramfs.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvmpass._dataclass import dataclass
from kvmpass.initramfs.cpio import Tree
from kvmpass.initramfs.init import DIRECTORY, calls

ROOT = f"{DIRECTORY}/root"
"""The root of programs, if it is not the initramfs."""
MOUNTS = f"{DIRECTORY}/mounts"
"""The script by which init mounts all, once the modules are loaded."""
UPPER = f"{DIRECTORY}/upper"
"""What the overlay has above the host's files."""
DRIVERS = ("virtio_pci", "virtiofs", "overlay")
"""The modules that all this needs."""
_ROOT_TABLE, _SHARES_TABLE = f"{DIRECTORY}/root.fstab", f"{DIRECTORY}/shares.fstab"
_LOWER, _WORK = f"{DIRECTORY}/lower", f"{DIRECTORY}/work"
OWN = ("/dev", "/proc", "/run", "/sys", "/tmp")
"""Directories of the root that are the guest's own, with all that is mounted there."""
# A directory that cannot be read is no reason not to run the command.
_ENTER = 'cd "$0" 2>/dev/null || echo "kvmpass: $0 cannot be entered: starting in /" >&2; exec "$@"'
# One that was asked for is.
_ENTER_OR_END = 'cd "$0" || exit 127; exec "$@"'


def change_directory(directory: str) -> bytes:
    """Return a line of a shell script for ``directory``, if there is one."""
    return f"cd {shlex.quote(directory)} || exit 127\n".encode("utf-8", "surrogateescape") if directory else b""


@dataclass(frozen=True, slots=True)
class Served:
    """A virtio file system, and where the guest mounts it."""

    tag: str
    """Its tag."""
    target: str
    """The absolute path in the guest; ``/``: its root."""
    writable: bool = False
    """Whether the host lets the guest write to it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """How a program starts in ``ROOT``."""

    directory: str = "/root"
    """The working directory."""
    home: str = "/root"
    """``HOME``."""
    path: str = ""
    """``PATH``; empty: as everywhere in the guest."""
    shell: str = "/bin/sh"
    """The shell on the console, if no command is given."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that differ from those of init."""
        found = {"HOME": self.home, "SHELL": self.shell, "PATH": self.path}
        return {name: value for name, value in found.items() if value}

    def script(self, command: Sequence[str], environment: Sequence[str] = (), directory: str = "") -> bytes:
        """Return the shell script that becomes ``command``; empty: the shell.

        ``environment``: further variables, as ``NAME=VALUE``. ``directory``: another one, which must exist.
        """
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        lines = [shlex.join(("export", variable)) for variable in (*variables, *environment)]
        enter, place = (_ENTER_OR_END, directory) if directory else (_ENTER, self.directory)
        words = ["exec", "chroot", ROOT, "/bin/sh", "-c", enter, place, *(command or (self.shell, "-l"))]
        return "".join(f"{line}\n" for line in [*lines, shlex.join(words)]).encode("utf-8", "surrogateescape")


def add(tree: Tree, mounts: Iterable[Served], empty: Iterable[str] = ()) -> bool:
    """Add what init needs for ``mounts`` to ``tree``; return whether one of them is the root.

    ``empty``: directories of the root that the guest gets empty, in its memory.
    """
    mounts = sorted(mounts, key=lambda mount: mount.target)  # the root first, and a directory before those below it
    root = mounts[0].target == "/"
    script: list[tuple[str, ...]] = []
    if root:
        for path in (_LOWER, UPPER, _WORK, ROOT):
            tree.directory(path)
        layers = f"lowerdir={_LOWER},upperdir={UPPER},workdir={_WORK}"
        lines = [(mounts[0].tag, _LOWER, "virtiofs", "ro"), ("overlay", ROOT, "overlay", layers)]
        lines += [(path, ROOT + path, "none", "rbind") for path in OWN]
        lines += [("tmpfs", ROOT + path, "tmpfs", "mode=0700") for path in empty]
        tree.file(_ROOT_TABLE, _table(lines))
        script.append(("mount_all", _ROOT_TABLE))
    if shares := mounts[root:]:
        places = {(ROOT if root else "") + share.target: share for share in shares}
        access = {True: "rw", False: "ro"}
        lines = [(share.tag, place, "virtiofs", access[share.writable]) for place, share in places.items()]
        tree.file(_SHARES_TABLE, _table(lines))
        # In the guest: the directory may be in one of its own file systems.
        script += [("mkdir", "-p", *places), ("mount_all", _SHARES_TABLE)]
    tree.file(MOUNTS, calls(script))
    return root


def _table(lines: Iterable[tuple[str, ...]]) -> bytes:
    """Return an fstab(5): one process mounts all of it."""
    return "".join(f"{' '.join(map(_escaped, line))} 0 0\n" for line in lines).encode("utf-8", "surrogateescape")


def in_root(root: Path, target: str) -> str:
    """Return ``target`` without symlinks, as in a guest whose root has the files of ``root``.

    Init mounts from outside of that root, where absolute symlinks of it would lead elsewhere.
    """
    done, words = Path("/"), [word for word in target.split("/") if word]
    for _ in range(1000):
        if not words:
            break
        word = words.pop(0)
        if word == "..":
            done = done.parent
            continue
        try:
            link = os.readlink(root / done.relative_to("/") / word)  # noqa: PTH115 - a Path loses "./"
        except OSError:
            done /= word
            continue
        if link.startswith("/"):
            done = Path("/")
        words[:0] = [part for part in link.split("/") if part not in ("", ".")]
    return str(done)


def _escaped(word: str) -> str:
    """Escape what separates fields: see getmntent(3)."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in word)
