"""A recorded host, from a directory or an archive that a stranger may have made: read, and never trusted.

An archive is unpacked into a directory of its own: plain files, directories and links that stay inside, and no more
of them than a host has. A directory is held to the same before anything of it is read.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kvmpass.errors import KvmpassError
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.host.sysfs import Sysfs

MANIFEST = "kvmpass-record.json"
VERSION = 1
_MOST_ENTRIES = 1_000_000
_BIGGEST_FILE = 64 << 20
_MOST_BYTES = 1 << 30
# Links that are only ever read, never followed: what a process has open, its namespaces.
_ONLY_READ = re.compile(r"proc/(?:\d+|self)/(?:fd|ns)/[^/]+")
_CONTROLS: dict[int, str | None] = dict.fromkeys([*set(range(32)) - {9, 10}, *range(0x7F, 0xA0)], "?")
_CONTROLS[0] = None  # some of the kernel's files end so
_T = TypeVar("_T")


class BadRecord(KvmpassError):
    """Not a recorded host, or one that was made to do harm."""


class RecordedSysfs(Sysfs):
    """A recorded tree. What its maker could not read cannot be read here; what is no file was answered there.

    A tree without ``kvmpass-record.json`` is read as it is.
    """

    recorded = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        manifest = _manifest(root / MANIFEST)
        closed, answers = manifest.get("closed", []), manifest.get("answers", {})
        if not isinstance(closed, list) or not isinstance(answers, dict):
            raise BadRecord(f"{MANIFEST} is damaged")
        self._closed = {os.path.realpath(self.place(str(name))) for name in closed}
        self._answers: dict[str, Any] = _all_printable(answers)

    def data(self, *parts: str, size: int = -1) -> bytes:
        place = self.place(*parts)
        if self._closed and os.path.realpath(place) in self._closed:
            raise PermissionError(13, "was not read when it was recorded", place)
        return super().data(*parts, size=size)

    def text(self, *parts: str) -> str | None:
        found = super().text(*parts)
        return None if found is None else _printable(found)

    def link(self, *parts: str) -> str | None:
        found = super().link(*parts)
        return None if found is None else _printable(found)

    def names(self, *parts: str) -> list[str]:
        return [_printable(name) for name in super().names(*parts)]

    def log(self) -> KernelLog:
        error = self._answers.get("kernel log error")
        if error is not None:
            return KernelLog((), False, _printable(str(error)))
        found = super().log()
        return replace(found, records=tuple(replace(one, text=_printable(one.text)) for one in found.records))

    def ask(self, question: str, answer: Callable[[], _T]) -> _T:
        if question not in self._answers:
            return super().ask(question, answer)
        found: _T = self._answers[question]
        return found

    def write(self, path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
        raise BadRecord(f"{path} is of a recorded host: nothing can be changed there")


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return text.translate(_CONTROLS)


def _all_printable(value: Any) -> Any:
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, dict):
        return {key: _all_printable(one) for key, one in value.items()}
    return [_all_printable(one) for one in value] if isinstance(value, list) else value


def _manifest(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(_BIGGEST_FILE))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord(f"{MANIFEST} is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise BadRecord(
            f"this is a record of another version ({found.get('version') if isinstance(found, dict) else '?'})",
            "use the kvmpass that has made it, or a newer one",
        )
    return found


@contextmanager
def open_recorded(place: Path) -> Iterator[RecordedSysfs]:
    """The recorded host in the directory or the archive ``place``; what was unpacked is removed afterwards.

    Raises ``BadRecord``, ``OSError``.
    """
    if place.is_dir():
        if place.resolve() == Path("/"):
            raise BadRecord("/ is this host, not a recorded one", "leave out --sysfs")
        _check_tree(place)
        yield RecordedSysfs(place)
        return
    directory = Path(tempfile.mkdtemp(prefix="kvmpass-record-"))
    try:
        _unpack(place, directory)
        _check_tree(directory)
        yield RecordedSysfs(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _unpack(file: Path, directory: Path) -> None:
    entries = total = 0
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                entries, total = entries + 1, total + max(member.size, 0)
                if entries > _MOST_ENTRIES or member.size > _BIGGEST_FILE or total > _MOST_BYTES:
                    raise BadRecord(f"{file} is larger than any host's record")
                _unpack_one(archive, member, directory)
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise BadRecord(f"{file} is no archive of a recorded host: {error}") from None
    if not entries:
        raise BadRecord(f"{file} is empty")


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> None:
    name = _inside(member.name)
    if name is None:
        raise BadRecord(f"the archive has an entry outside of the tree: {member.name!r}")
    if name == ".":
        return
    target = directory / name
    _make_parents(directory, posixpath.dirname(name))
    if member.isdir():
        _make_parents(directory, name)
    elif member.issym():
        if os.path.lexists(target):
            raise BadRecord(f"the archive has {name} twice")
        target.symlink_to(member.linkname)
    elif member.isreg():
        content = archive.extractfile(member)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(target, flags, 0o600)
        except FileExistsError:
            raise BadRecord(f"the archive has {name} twice") from None
        with os.fdopen(fd, "wb") as opened:
            if content is not None:
                shutil.copyfileobj(content, opened)
    else:
        raise BadRecord(f"the archive has an entry that is neither file, directory nor link: {name}")


def _inside(name: str) -> str | None:
    """A name as a path below the tree; None where it leads out."""
    if name.startswith("/") or "\0" in name:
        return None
    plain = posixpath.normpath(name)
    return None if plain == ".." or plain.startswith("../") else plain


def _make_parents(directory: Path, name: str) -> None:
    """Directories, none of them through a link."""
    at = directory
    for part in name.split("/"):
        at = at / part
        try:
            at.mkdir(mode=0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(at).st_mode):
                raise BadRecord(f"the archive has entries below {part}, which is no directory") from None


def _check_tree(directory: Path) -> None:
    """Plain files, directories, and links that stay inside: nothing that blocks, acts or shows something else."""
    root = os.path.realpath(directory)
    count, left = 0, [""]
    while left:
        here = left.pop()
        try:
            entries = list(os.scandir(f"{root}/{here}"))
        except PermissionError:  # and so nothing below it is read
            continue
        for entry in entries:
            count += 1
            relative = f"{here}/{entry.name}".lstrip("/")
            if count > _MOST_ENTRIES:
                raise BadRecord(f"{directory} is larger than any host's record")
            if entry.is_symlink():
                if not (_ONLY_READ.fullmatch(relative) or _stays_inside(root, relative)):
                    raise BadRecord(f"{relative} is a link that leads out of the tree")
            elif entry.is_dir(follow_symlinks=False):
                left.append(relative)
            elif not entry.is_file(follow_symlinks=False):
                raise BadRecord(f"{relative} is neither a file nor a directory")


def _stays_inside(root: str, relative: str) -> bool:
    """Whether a link does not lead out of the tree, as long as the others do not.

    As sysfs makes them, a link climbs first and descends then, which needs no look at where others lead.
    """
    parts = os.readlink(f"{root}/{relative}").split("/")  # noqa: PTH115 - a host has tens of thousands
    climbs = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    if parts[0] == "":
        return False
    if ".." not in parts[climbs:]:
        return climbs <= relative.count("/")
    target = os.path.realpath(f"{root}/{relative}")
    return target == root or target.startswith(root + "/")
