"""Kernel modules for devices: from modaliases to files in the order of loading.

From depmod's tables (modules.alias, .dep, .softdep, .builtin, .builtin.modinfo; depmod.d(5), modules.dep(5)) and the
``.modinfo`` sections of modules under test.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kvmpass._dataclass import dataclass
from kvmpass.errors import KvmpassError
from kvmpass.initramfs import elf
from kvmpass.initramfs.parameters import words as words_of

if TYPE_CHECKING:
    from mmap import mmap


def normalize(name: str) -> str:
    """Return a module's name with ``_`` for ``-``, which are equal in names of modules."""
    return name.replace("-", "_")


def module_name(path: str | Path) -> str:
    """Return the name of a module's file: ``e1000e`` for ``kernel/drivers/net/e1000e.ko.xz``."""
    return normalize(str(path).rpartition("/")[2].partition(".ko")[0])


def decompress(path: Path) -> bytes:
    """Read a module, compressed by xz, gzip, zstd or not at all. Raises ``KvmpassError`` for a broken file."""
    data = path.read_bytes()
    try:
        if data[:6] == b"\xfd7zXZ\0":
            import lzma

            data = lzma.decompress(data)
        elif data[:2] == b"\x1f\x8b":
            import gzip

            data = gzip.decompress(data)
        elif data[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard

            # The stream interface: a frame may lack the size of its content.
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except Exception as error:
        raise KvmpassError(f"{path}: cannot be decompressed: {error}") from error
    if not elf.is_elf(data):
        raise KvmpassError(f"{path} is not a kernel module for x86-64")
    return data


@dataclass(frozen=True, slots=True)
class Module:
    """A module to load."""

    name: str
    """Its name, with ``_``."""
    data: bytes
    """Its content, decompressed."""
    under_test: bool = False
    """Whether it is the user's."""


def modinfo(data: bytes | mmap) -> dict[str, list[str]]:
    """Return the values in ``.modinfo`` by key. Raises ``ValueError`` without it."""
    found: dict[str, list[str]] = {}
    for text in elf.section(data, ".modinfo").decode("utf-8", "replace").split("\0"):
        key, equals, value = text.partition("=")
        if equals:
            found.setdefault(key, []).append(value)
    if not found:
        raise ValueError("no .modinfo")
    return found


def _candidates(modalias: str) -> str:
    """Return a regular expression for the patterns that agree with ``modalias`` up to their first wildcard.

    Some more may match: it compares five characters at a time, as one at a time takes twice as long to compile. The
    tables have tens of thousands of lines: few of them remain for ``fnmatch``. Twenty characters contain a PCI
    device's vendor and device ID.
    """
    bus, colon, rest = modalias.partition(":")
    expression = r"[^\s\0]*"
    for start in range(15, -1, -5):
        if part := rest[start : start + 5]:
            expression = rf"(?:{re.escape(part)}{expression}|[^\s\0*?\[]{{0,4}}+[*?\[][^\s\0]*)"
    return re.escape(bus + colon) + expression


class ModuleTree:
    """``/lib/modules/RELEASE``. Tables are read on first use; a missing directory is an empty tree."""

    def __init__(self, release: str, root: Path = Path("/lib/modules")) -> None:
        self.release = release
        """The kernel's release, as in ``uname -r``."""
        self.directory = root / release
        """The directory of its modules."""

    @property
    def exists(self) -> bool:
        """Whether there are modules of this kernel."""
        return (self.directory / "modules.dep").is_file()

    def _text(self, name: str) -> str:
        try:
            return (self.directory / name).read_text("utf-8", "replace")
        except FileNotFoundError:
            return ""

    @cached_property
    def _dependencies(self) -> dict[str, str]:
        return {module_name(line.partition(":")[0]): line for line in self._text("modules.dep").splitlines()}

    @cached_property
    def _builtin(self) -> frozenset[str]:
        return frozenset(map(module_name, self._text("modules.builtin").splitlines()))

    def lookup(self, name: str) -> tuple[str, ...] | None:
        """Return the file of a module, then those it needs, in reverse order of loading; None: no file."""
        path, colon, needed = self._dependencies.get(normalize(name), "").partition(":")
        return (path, *needed.split()) if colon else None

    def is_builtin(self, name: str) -> bool:
        """Return whether a module is built into the kernel."""
        return normalize(name) in self._builtin

    def lacks(self, name: str) -> bool:
        """Return whether the kernel is known to have a module neither as a file nor built in."""
        return self.exists and bool(self._builtin) and self.lookup(name) is None and not self.is_builtin(name)

    def find(self, modaliases: Iterable[str]) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the modules for ``modaliases``, and those of them that have a driver, a module or built in."""
        modules: dict[str, None] = {}
        matched: set[str] = set()
        aliases, builtin = self._text("modules.alias"), self._text("modules.builtin.modinfo")
        for modalias in sorted(set(modaliases)):
            wanted, bus = _candidates(modalias), modalias.partition(":")[0]
            # The patterns are among the longest: they are compiled only for tables with aliases of that bus.
            loadable = re.findall(rf"alias ({wanted}) (\S+)", aliases) if f"alias {bus}:" in aliases else []
            names = [normalize(name) for pattern, name in loadable if fnmatch.fnmatchcase(modalias, pattern)]
            modules |= dict.fromkeys(names)
            in_kernel = rf"(?:^|[\n\0])[^.\0]+\.alias=({wanted})(?=\0|$)"
            patterns = re.findall(in_kernel, builtin) if f".alias={bus}:" in builtin else []
            if names or any(fnmatch.fnmatchcase(modalias, pattern) for pattern in patterns):
                matched.add(modalias)
        return tuple(modules), frozenset(matched)

    def softdeps(self) -> dict[str, tuple[list[str], list[str]]]:
        """Return, by the name of a module, the modules to load before, and after it."""
        result: dict[str, tuple[list[str], list[str]]] = {}
        for line in self._text("modules.softdep").splitlines():
            match line.split():
                case ["softdep", name, *words]:
                    before, after = result.setdefault(normalize(name), ([], []))
                    current = before
                    for word in words:
                        if word in ("pre:", "post:"):
                            current = before if word == "pre:" else after
                        else:
                            current.append(normalize(word))
        return result


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """The modules that a guest loads."""

    modules: tuple[Module, ...]
    """The modules, in the order of loading."""
    matched: frozenset[str]
    """The modaliases that have a driver."""
    idle: tuple[Path, ...] = ()
    """The user's files that match none of the modaliases, and that no other module needs."""


def plan(
    tree: ModuleTree, modaliases: Iterable[str], files: Sequence[Path] = (), extra: Iterable[str] = ()
) -> ModulePlan:
    """Plan the kernel's modules for ``modaliases`` and ``extra`` (names), and the user's ``files``.

    Dependencies are included. A file replaces the kernel's module of the same name, and the kernel's drivers for the
    modaliases that it matches. Raises ``KvmpassError`` for a file that is not a module, was built for another kernel,
    or depends on a module that does not exist.
    """
    aliases = frozenset(modaliases)
    given = {module_name(path): _read(path, tree.release) for path in files}
    replaced = {alias for alias in aliases if any(file.matches(alias) for file in given.values())}
    found, matched = tree.find(aliases - replaced)
    softdeps = tree.softdeps()
    modules: list[Module] = []
    visited: set[str] = set()
    wanted = (*found, *map(normalize, extra))
    needed = set(wanted)

    def visit(name: str) -> None:
        if name in visited:
            return
        visited.add(name)
        if name in given:
            depends = given[name].depends
            for other in depends:
                known = other in given or tree.lookup(other) or tree.is_builtin(other)
                if tree.exists and not known:
                    raise KvmpassError(
                        f"module {name} depends on {other}, which kernel {tree.release} does not have",
                        "name it with another --module",
                    )
            module = Module(name, given[name].data, under_test=True)
        elif stock := tree.lookup(name):
            depends = list(map(module_name, reversed(stock[1:])))
            module = Module(name, decompress(tree.directory / stock[0]))
        else:
            return
        before, after = softdeps.get(name, ((), ()))
        needed.update(before, depends, after)
        for other in (*before, *depends):
            visit(other)
        modules.append(module)
        for other in after:
            visit(other)

    for name in (*wanted, *given):
        visit(name)
    idle = [
        file.path
        for name, file in given.items()
        if aliases and name not in needed and not any(map(file.matches, aliases))
    ]
    return ModulePlan(tuple(modules), matched | replaced, tuple(idle))


@dataclass(frozen=True, slots=True)
class _File:
    """A module of the user's."""

    path: Path
    data: bytes
    aliases: list[str]
    depends: list[str]

    def matches(self, modalias: str) -> bool:
        return any(fnmatch.fnmatchcase(modalias, pattern) for pattern in self.aliases)


def _read(path: Path, release: str) -> _File:
    try:
        data = decompress(path)
        info = modinfo(data)
    except FileNotFoundError as error:
        file, blank, parameters = str(path).partition(" ")
        if blank and Path(file).is_file():
            words = " ".join(f"{module_name(file)}.{word}" for word in words_of(parameters))
            error.add_note(f"use --append for parameters of a module: --append {shlex.quote(words)}")
        raise
    except ValueError as error:
        raise KvmpassError(f"{path} is not a kernel module: {error}") from error
    vermagic = "".join(info.get("vermagic", ()))
    built_for = vermagic.partition(" ")[0]
    # With symbol versions the kernel itself compares those, not the release.
    if built_for and built_for != release and "modversions" not in vermagic and release:
        raise KvmpassError(
            f"{path} was built for kernel {built_for}, the guest's is {release}",
            "build it for the guest's kernel, or name its kernel with --kernel",
        )
    depends = ",".join(info.get("depends", ())).split(",")
    return _File(path, data, info.get("alias", []), [normalize(name) for name in depends if name])
