"""A recorded host, from a directory or an archive, which is not trusted.

An archive is unpacked into a directory of its own: only plain files, directories and links that stay inside, and only
up to limits of number and size. A directory is checked in the same way before anything of it is read.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kvmpass._dataclass import replace
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import KvmpassError
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.host.sysfs import Sysfs

MANIFEST = "kvmpass-record.json"
VERSION = 1
_MOST_ENTRIES = 1_000_000
_BIGGEST_FILE = 64 << 20
_MOST_BYTES = 1 << 30
ONLY_READ = lazy_pattern(r"proc/(?:\d+|self)/(?:fd|ns)/[^/]+")
"""Links that are read, never followed: open files and namespaces of processes."""
_CONTROLS: dict[int, str | None] = dict.fromkeys([*set(range(32)) - {9, 10}, *range(0x7F, 0xA0)], "?")
_CONTROLS[0] = None  # the end of some of the kernel's files
_T = TypeVar("_T")


class BadRecord(KvmpassError):
    """The directory or archive is not a valid recording."""


class RecordedSysfs(Sysfs):
    """A recorded tree. Files that could not be read on the host cannot be read here; :meth:`ask` has its answers.

    A tree without ``kvmpass-record.json`` is read as it is. Raises ``BadRecord``.
    """

    recorded = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        manifest = _manifest(root / MANIFEST)
        closed, answers = manifest.get("closed", []), manifest.get("answers", {})
        if not isinstance(closed, list) or not isinstance(answers, dict):
            raise BadRecord(f"{MANIFEST} is damaged")
        self._closed = {os.path.realpath(self.place(str(name))) for name in closed}
        self._answers: dict[str, Any] = map_texts(answers, _printable)

    def data(self, *parts: str, size: int = -1) -> bytes:
        """Return the content of a file. Raises ``PermissionError`` if it could not be read on the host."""
        place = self.place(*parts)
        if self._closed and os.path.realpath(place) in self._closed:
            raise PermissionError(errno.EACCES, "not readable when it was recorded", place)
        return super().data(*parts, size=size)

    def text(self, *parts: str) -> str | None:
        """Return the text of a file, without control characters."""
        found = super().text(*parts)
        return None if found is None else _printable(found)

    def link(self, *parts: str) -> str | None:
        """Return the last component of a link's target, without control characters."""
        found = super().link(*parts)
        return None if found is None else _printable(found)

    def names(self, *parts: str) -> list[str]:
        """Return the names in a directory, without control characters."""
        return [_printable(name) for name in super().names(*parts)]

    def log(self, word: bytes = b"") -> KernelLog:
        """Return the recorded kernel log, or the error of reading it."""
        error = self._answers.get("kernel log error")
        if error is not None:
            return KernelLog((), False, _printable(str(error)))
        found = super().log(word)
        return replace(
            found, records=tuple(record._replace(text=_printable(record.text)) for record in found.records)
        )

    def ask(self, question: str, answer: Callable[[], _T]) -> _T:
        """Return the recorded answer to ``question``."""
        if question not in self._answers:
            return super().ask(question, answer)
        found: _T = self._answers[question]
        return found

    def write(self, path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
        """Raise :class:`BadRecord`: a recording is read-only."""
        raise BadRecord(f"{path} is part of a recording: it cannot be written")


def _printable(text: str) -> str:
    """Without control characters."""
    return text if text.isprintable() else text.translate(_CONTROLS)


def map_texts(value: Any, text: Callable[[str], str], key: Callable[[str], str] = str) -> Any:
    """Return a JSON value with ``text`` applied to every string in it, and ``key`` to every key."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {key(name): map_texts(item, text, key) for name, item in value.items()}
    return [map_texts(item, text, key) for item in value] if isinstance(value, (list, tuple)) else value


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
            "use the version of kvmpass that has recorded it, or a newer one",
        )
    return found


@contextmanager
def open_recorded(place: Path) -> Iterator[RecordedSysfs]:
    """Open the recording in the directory or archive ``place``; unpacked files are removed afterwards.

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
                    raise BadRecord(f"{file} is too large for a recording")
                _unpack_one(archive, member, directory)
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise BadRecord(
            f"{file} is not an archive of a recorded host: {error}", "name one that kvmpass doctor --record has made"
        ) from None
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
    """Return a name as a path below the tree; None if it is outside."""
    if name.startswith("/") or "\0" in name:
        return None
    plain = posixpath.normpath(name)
    return None if plain == ".." or plain.startswith("../") else plain


def _make_parents(directory: Path, name: str) -> None:
    """Create directories, none of them through a link."""
    at = directory
    for part in name.split("/"):
        at = at / part
        try:
            at.mkdir(mode=0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(at).st_mode):
                raise BadRecord(f"the archive has entries below {part}, which is not a directory") from None


def _check_tree(directory: Path) -> None:
    """Raise ``BadRecord`` unless there are only plain files, directories, and links that stay inside."""
    root = os.path.realpath(directory)
    count, left = 0, [""]
    while left:
        here = left.pop()
        try:
            entries = list(os.scandir(f"{root}/{here}"))
        except PermissionError:  # nothing below it can be read
            continue
        for entry in entries:
            count += 1
            relative = f"{here}/{entry.name}".lstrip("/")
            if count > _MOST_ENTRIES:
                raise BadRecord(f"{directory} is too large for a recording")
            if entry.is_symlink():
                if not (ONLY_READ.fullmatch(relative) or _stays_inside(root, relative)):
                    raise BadRecord(f"{relative} is a link that leads out of the tree")
            elif entry.is_dir(follow_symlinks=False):
                left.append(relative)
            elif not entry.is_file(follow_symlinks=False):
                raise BadRecord(f"{relative} is neither a file nor a directory")


def _stays_inside(root: str, relative: str) -> bool:
    """Whether a link stays in the tree, as long as all others do.

    Links of sysfs have ``..`` at the beginning only: then other links need not be resolved.
    """
    parts = os.readlink(f"{root}/{relative}").split("/")  # noqa: PTH115 - a host has tens of thousands
    climbs = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    if parts[0] == "":
        return False
    if ".." not in parts[climbs:]:
        return climbs <= relative.count("/")
    target = os.path.realpath(f"{root}/{relative}")
    return target == root or target.startswith(root + "/")
