"""Recording of a host: the files that the read-only commands read, and nothing else.

A :class:`Recorder` is a :class:`~kvmpass.host.sysfs.Sysfs` that keeps what it reads while ``list``, ``show``,
``doctor`` and ``plan`` run over it. Facts that are not in files (permissions of nodes, capabilities of KVM) go
through :meth:`~kvmpass.host.sysfs.Sysfs.ask`, and into ``kvmpass-record.json``.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import posixpath
import stat
import tarfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from kvmpass._lazy import lazy_pattern
from kvmpass.errors import KvmpassError
from kvmpass.host.address import Bdf
from kvmpass.host.kernel.kmsg import PATH as KMSG
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.host.look import Look
from kvmpass.host.record.anonymity import Anonymity
from kvmpass.host.record.recorded import MANIFEST, ONLY_READ, VERSION, map_texts
from kvmpass.host.sysfs import PCI_DEVICES, Sysfs

_BIGGEST_FILE = 4 << 20  # bytes; /proc/iomem of the largest hosts is a tenth of it
_DATABASES = ("usr/share/", "run/udev/")  # their answers are recorded
_IGNORED_NODES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/pts/", "/dev/ptmx")
_DESCRIPTORS = lazy_pattern(r"proc/(?:\d+|self)/fd")
_T = TypeVar("_T")


class Recorder(Sysfs):
    """Reads the host at ``root``, and keeps what was read. Changes nothing, and resumes no device.

    Synchronization: for one thread.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__(root)
        self._seen: dict[str, bytes | None] = {}  # what was read; None: only whether it exists
        self._links: set[str] = set()
        self._listed: dict[str, list[str]] = {}
        self._answers: dict[str, Any] = {}

    # --- reading

    def place(self, *parts: str) -> str:
        """Return the path of a file, and note that it was looked at."""
        self._seen.setdefault(_name(*parts), None)
        return super().place(*parts)

    def data(self, *parts: str, size: int = -1) -> bytes:
        """Read a file, and note its content. Raises ``OSError`` for the registers of a suspended device."""
        name = _name(*parts)
        if parts[0] == PCI_DEVICES and parts[-1] == "config" and self.is_asleep(Bdf.parse(parts[1])):
            raise OSError(errno.EIO, "suspended, and not resumed for a recording", name)
        content = super().data(*parts, size=size)
        if len(content) <= _BIGGEST_FILE and not name.startswith(_DATABASES):
            before = self._seen.get(name)
            if before is None or len(before) < len(content) or size < 0:
                self._seen[name] = content
        return content

    def link(self, *parts: str) -> str | None:
        """Read a link, and note it."""
        self._links.add(_name(*parts))
        return super().link(*parts)

    def names(self, *parts: str) -> list[str]:
        """List a directory, and note its names."""
        found = super().names(*parts)
        self._listed[_name(*parts)] = found
        return found

    def log(self, word: bytes = b"") -> KernelLog:
        """Read all of the kernel's log, and note its own records: those of programs may be private."""
        found = super().log()
        self._answers["kernel log error"] = found.error
        lines = []
        for record in found.records:
            if record.by_kernel:  # messages of programs may be private
                lines.append(f"6,{record.sequence},0,-;{record.text}")
                if record.structured:
                    lines.append(f" DEVICE={'other' if record.device is None else f'+pci:{record.device}'}")
        self._seen[KMSG] = "\n".join([*lines, ""]).encode()
        return found

    def ask(self, question: str, answer: Callable[[], _T]) -> _T:
        """Ask ``answer``, and note what it returns."""
        self._answers[question] = found = super().ask(question, answer)
        return found

    # --- writing

    def write_tar(self, file: Path, anonymity: Anonymity | None = None) -> int:
        """Write what was read to a new archive, compressed by its suffix. Returns the number of entries.

        Raises ``FileExistsError``, ``OSError``; an incomplete file is removed.
        """
        entries = _Entries(self.root)
        for name, content in self._seen.items():
            entries.add(name, content)
        for name in self._links:
            entries.link(name)
        for directory, names in self._listed.items():
            if directory == "proc":  # a process is included if something of it was read
                continue
            for name in names:
                entries.listed(directory, name)
        members = entries.members(anonymity)
        manifest = {
            "version": VERSION,
            "closed": sorted(anonymity.name(name) if anonymity else name for name in entries.unread),
            "answers": map_texts(self._answers, anonymity.text, anonymity.name) if anonymity else self._answers,
        }
        members[MANIFEST] = ("file", json.dumps(manifest, indent=1, sort_keys=True).encode())
        mode = {".gz": "x:gz", ".tgz": "x:gz", ".xz": "x:xz", ".bz2": "x:bz2"}.get(file.suffix, "x")
        try:
            with tarfile.open(file, mode, format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
                _write(archive, members)
        except FileExistsError as error:
            error.add_note("name another file, or remove this one")
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # it has the same reason, or one that matters less
                file.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = error.filename or str(file)  # a failed write has none
                error.add_note("name a file in a directory where this user may write, and that has space")
            raise
        return len(members)


def _write(archive: tarfile.TarFile, members: dict[str, tuple[str, bytes]]) -> None:
    now = int(time.time())
    for name in sorted(members):
        kind, content = members[name]
        info = tarfile.TarInfo(name)
        info.mtime = now
        if kind == "directory":
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        elif kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, content.decode(errors="surrogateescape")
        else:
            info.mode, info.size = 0o644, len(content)
        archive.addfile(info, io.BytesIO(content) if kind == "file" else None)


def _name(*parts: str) -> str:
    return "/".join(part for part in "/".join(parts).split("/") if part not in ("", "."))


class _Entries:
    """The entries of the archive: requested paths at their resolved places, with the links in between."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._found: dict[str, tuple[str, bytes | None]] = {}  # None: a file that was not read
        self._directories: dict[str, str | None] = {}

    @property
    def unread(self) -> set[str]:
        """Files that exist and were not read."""
        return {name for name, (_, content) in self._found.items() if content is None}

    def add(self, name: str, content: bytes | None) -> None:
        """Add a file with its content, or (None) the existence of a file or directory."""
        place = self._place(name)
        if not place:  # outside, or the root itself
            return
        if content is not None:
            self._found[place] = ("file", content)
        else:
            try:
                directory = stat.S_ISDIR(os.lstat(self._root / place).st_mode)
            except OSError:
                return
            self._found.setdefault(place, ("directory", b"") if directory else ("file", None))
        self._parents(place)

    def link(self, name: str) -> None:
        """Add a link and its target."""
        above, _, last = name.rpartition("/")
        place = self._place(above)
        try:
            target = str((self._root / (place or ".") / last).readlink())
        except OSError:
            return
        if place is not None and (not target.startswith("/") or ONLY_READ.fullmatch(f"{place}/{last}")):
            self._parents(f"{place}/{last}")
            self._found[f"{place}/{last}"] = ("link", os.fsencode(target))

    def listed(self, directory: str, name: str) -> None:
        """Add an entry of a directory; of a process's open files only those of devices."""
        path = f"{directory}/{name}"
        if _DESCRIPTORS.fullmatch(directory):
            with contextlib.suppress(OSError):
                target = str((self._root / path).readlink())
                if target.startswith(("/dev/", "/sys/devices/")) and not target.startswith(_IGNORED_NODES):
                    self.link(path)
            return
        self.add(path, None)
        if (self._root / path).is_symlink():
            self.link(path)

    def _place(self, name: str) -> str | None:
        """Return the same as :meth:`_resolved`; directories are resolved once."""
        above, separator, last = name.rpartition("/")
        if not separator or last == "..":
            return self._resolved(name)
        if above not in self._directories:
            self._directories[above] = self._resolved(above)
        parent = self._directories[above]
        return None if parent is None else self._resolved(last, parent)

    def _resolved(self, name: str, below: str = "") -> str | None:
        """Return the resolved path below the root; adds all links in between. None if it is outside, or a loop."""
        done = below.split("/") if below else []
        todo = [part for part in name.split("/") if part not in ("", ".")]
        for _ in range(4096):
            if not todo:
                return "/".join(done)
            part = todo.pop(0)
            if part == "..":
                if not done:
                    return None
                done.pop()
                continue
            here = "/".join([*done, part])
            try:
                target = "" if here == "proc/self" else str((self._root / here).readlink())
            except OSError:
                target = ""
            if not target:
                done.append(part)
                continue
            if target.startswith("/"):
                target = posixpath.relpath(os.path.relpath(target, "/"), "/".join(done) or ".")
            self._parents(here)
            self._found[here] = ("link", os.fsencode(target))
            todo = [*(name for name in target.split("/") if name not in ("", ".")), *todo]
        return None

    def _parents(self, place: str) -> None:
        for parent in PurePosixPath(place).parents:
            if str(parent) != ".":
                self._found.setdefault(str(parent), ("directory", b""))

    def members(self, anonymity: Anonymity | None) -> dict[str, tuple[str, bytes]]:
        """Return the entries by path, each with its kind (``file``, ``directory``, ``link``) and content."""
        found = {name: (kind, content or b"") for name, (kind, content) in self._found.items()}
        if anonymity is None:
            return found
        return {
            anonymity.name(name): (kind, anonymity.content(name, kind, content))
            for name, (kind, content) in found.items()
        }


def record(recorder: Recorder, ask: Callable[[Recorder, Bdf, Look], object]) -> None:
    """Call ``ask`` for each device of the host; a device that is removed concurrently is left out."""
    look = Look(recorder)
    for name in recorder.names(PCI_DEVICES):
        with contextlib.suppress(KvmpassError, OSError):
            ask(recorder, Bdf.parse(name), look)
