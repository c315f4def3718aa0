"""The dynamic section of ELF files, and the search for libraries (ELF gABI; ld.so(8)).

Libraries that a program opens with dlopen (NSS, gconv, plug-ins) are not found.
"""

from __future__ import annotations

import itertools
import os.path
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvmpass._dataclass import dataclass
from kvmpass.errors import KvmpassError

if TYPE_CHECKING:
    from mmap import mmap

MAGIC = b"\x7fELF"
PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 0, 1, 5, 15, 29

DEFAULT_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


@dataclass(frozen=True, slots=True)
class Dynamic:
    """What an ELF file needs to start."""

    interpreter: str | None
    """The dynamic linker; None for a library or a static program."""
    needed: tuple[str, ...]
    """The names of libraries (``DT_NEEDED``)."""
    search: tuple[str, ...]
    """``DT_RUNPATH``, else ``DT_RPATH``; may contain ``$ORIGIN``."""


def printable(text: str, limit: int = 60) -> str:
    """Return text of a file for a message: printable ASCII, at most ``limit`` characters."""
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def is_elf(data: bytes) -> bool:
    """Return whether ``data`` is an ELF file for x86-64, 64-bit."""
    return data[:6] == MAGIC + b"\x02\x01" and data[18:20] == b"\x3e\x00"


def _text(data: bytes | mmap, offset: int) -> str:
    end = data.find(b"\0", offset)
    if end < 0:
        raise IndexError
    return data[offset:end].decode("utf-8", "surrogateescape")


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn errors of reading beyond the end of a file into ``ValueError``."""
    try:
        yield
    except (IndexError, OverflowError, struct.error, StopIteration) as error:
        raise ValueError("a broken ELF file") from error


@_parsing()
def dynamic(data: bytes) -> Dynamic:
    """Parse the dynamic section. Raises ``ValueError`` for a broken file."""
    (offset,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    interpreter = None
    loads: list[tuple[int, int, int]] = []
    tags: list[tuple[int, ...]] = []
    for index in range(count):
        kind, _, at, address, _, length = struct.unpack_from("<IIQQQQ", data, offset + index * size)
        if kind == PT_LOAD:
            loads.append((address, at, length))
        elif kind == PT_DYNAMIC:
            entries = (struct.unpack_from("<QQ", data, entry) for entry in range(at, at + length, 16))
            tags = list(itertools.takewhile(lambda entry: entry[0] != DT_NULL, entries))
        elif kind == PT_INTERP:
            interpreter = _text(data, at)
    strings = next((value for tag, value in tags if tag == DT_STRTAB), None)
    if strings is None:
        return Dynamic(interpreter, (), ())
    base = next(strings - start + at for start, at, length in loads if start <= strings < start + length)

    def texts(wanted: int) -> list[str]:
        return [_text(data, base + value) for tag, value in tags if tag == wanted]

    paths = texts(DT_RUNPATH) or texts(DT_RPATH)
    return Dynamic(interpreter, tuple(texts(DT_NEEDED)), tuple(filter(None, ":".join(paths).split(":"))))


def _configured(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split("#", 1)[0].split()
        if len(words) > 1 and words[0] == "include":
            for pattern in words[1:]:
                for included in sorted(Path("/").glob(pattern.lstrip("/"))):
                    yield from _configured(included)
        elif words:
            yield words[0]


@lru_cache(maxsize=1)
def library_directories() -> tuple[str, ...]:
    """Return the directories of this host's dynamic linker: /etc/ld.so.conf, then the built-in ones."""
    return tuple(dict.fromkeys([*_configured(Path("/etc/ld.so.conf")), *DEFAULT_DIRECTORIES]))


@dataclass(frozen=True, slots=True)
class Located:
    """A file of the host that is copied into the guest."""

    host: Path
    """Its path on the host."""
    guest: str
    """The path where the guest's dynamic linker searches for it."""


def _origin(part: str, directory: str) -> str:
    return os.path.normpath(part.replace("${ORIGIN}", directory).replace("$ORIGIN", directory))


def find_library(name: str, search: Sequence[tuple[str, str]]) -> Located | None:
    """Return the file that the dynamic linker loads for ``name``; None: not found.

    ``search``: run paths, on the host and in the guest.
    """
    if "/" in name:
        return Located(Path(name), name) if Path(name).is_file() else None
    for host, guest in (*search, *((directory, directory) for directory in library_directories())):
        candidate = Path(host, name)
        try:
            with candidate.open("rb") as file:
                if is_elf(file.read(20)):
                    return Located(candidate, f"{guest}/{name}")
        except OSError:
            continue
    return None


def closure(path: Path, data: bytes, guest: str) -> dict[str, bytes]:
    """Return the files that the ELF file ``path`` needs to start in the guest at ``guest``: path there, and content.

    ``data``: its own content. Raises ``ValueError`` for a broken ELF file, ``KvmpassError`` for a library that is not
    found on this host.
    """
    found: dict[str, bytes] = {}
    todo: list[tuple[Located, bytes, list[tuple[str, str]]]] = [(Located(path, guest), data, [])]
    while todo:
        current, content, inherited = todo.pop()
        wants = dynamic(content)
        origins = str(current.host.resolve().parent), str(Path(current.guest).parent)
        search = [(_origin(part, origins[0]), _origin(part, origins[1])) for part in wants.search] + inherited
        targets: list[Located] = []
        for name in wants.needed:
            located = find_library(name, search)
            if located is None:
                raise KvmpassError(f"{current.host} needs {printable(name)}, which is not on this host")
            targets.append(located)
        if wants.interpreter is not None:
            if not wants.interpreter.startswith("/") or not Path(wants.interpreter).is_file():
                linker = printable(wants.interpreter) or "one without a name"
                raise KvmpassError(f"{current.host} needs the dynamic linker {linker}, which is not on this host")
            targets.append(Located(Path(wants.interpreter), wants.interpreter))
        for target in targets:
            if target.guest not in found:
                found[target.guest] = target.host.read_bytes()
                todo.append((target, found[target.guest], search))
    return found


@_parsing()
def section(data: bytes | mmap, wanted: str) -> bytes:
    """Return the content of the section ``wanted``; empty without it. Raises ``ValueError`` for a broken file."""
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, offset + index * size) for index in range(count)]
    names = headers[names_index][4] if headers else 0
    for name, _, _, _, at, length in headers:
        if _text(data, names + name) == wanted:
            return data[at : at + length]
    return b""
