"""Kernel modules for devices: from modaliases to files in the order of loading.

From depmod's tables (modules.alias, .dep, .softdep, .builtin, .builtin.modinfo; depmod.d(5), modules.dep(5)) and the
``.modinfo`` sections of modules under test.
"""

from __future__ import annotations

import fnmatch
import gzip
import lzma
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmpass.errors import KvmpassError
from kvmpass.initramfs import elf
from kvmpass.initramfs.parameters import words as words_of


def normalize(name: str) -> str:
    """Return a module's name with ``_`` for ``-``, which are equal in names of modules."""
    return name.replace("-", "_")


def module_name(path: str | Path) -> str:
    """Return the name of a module's file: ``e1000e`` for ``kernel/drivers/net/e1000e.ko.xz``."""
    return normalize(Path(path).name.split(".ko", 1)[0])


def decompress(path: Path) -> bytes:
    """Read a module, compressed by xz, gzip, zstd or not at all. Raises ``KvmpassError`` for a broken file."""
    data = path.read_bytes()
    try:
        if data[:6] == b"\xfd7zXZ\0":
            data = lzma.decompress(data)
        elif data[:2] == b"\x1f\x8b":
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


@dataclass(frozen=True, slots=True)
class ModInfo:
    """The ``.modinfo`` of a module."""

    aliases: tuple[str, ...]
    """Patterns of modaliases."""
    depends: tuple[str, ...]
    """Names of modules that it needs, with ``_``."""
    vermagic: str
    """The kernel's release and options; empty: none."""


def modinfo(data: bytes) -> ModInfo:
    """Parse ``.modinfo``: zero-separated ``key=value`` texts. Raises ``ValueError`` without it."""
    texts = elf.section(data, ".modinfo").split(b"\0")
    pairs = [text.decode("utf-8", "replace").partition("=") for text in texts if b"=" in text]
    if not pairs:
        raise ValueError("no .modinfo")
    depends = [name for key, _, value in pairs if key == "depends" for name in value.split(",") if name]
    return ModInfo(
        tuple(value for key, _, value in pairs if key == "alias"),
        tuple(normalize(name) for name in depends),
        next((value for key, _, value in pairs if key == "vermagic"), ""),
    )


def _candidates(modalias: str) -> str:
    """Return a regular expression for the patterns that agree with ``modalias`` up to their first wildcard.

    The tables have tens of thousands of lines: few of them remain for ``fnmatch``. Twenty characters contain a PCI
    device's vendor and device ID.
    """
    bus, colon, rest = modalias.partition(":")
    expression = r"[^\s\0]*"
    for letter in reversed(rest[:20]):
        expression = rf"(?:[*?\[][^\s\0]*|{re.escape(letter)}{expression})"
    return re.escape(bus + colon) + expression


@dataclass(frozen=True, slots=True)
class Found:
    """The drivers in a kernel's tables for some modaliases."""

    modules: tuple[str, ...]
    """Names of modules."""
    builtin: tuple[str, ...]
    """Names of built-in modules."""
    matched: frozenset[str]
    """The modaliases that have a driver."""


class ModuleTree:
    """``/lib/modules/RELEASE``. Tables are read on first use; a missing directory is an empty tree."""

    def __init__(self, release: str, root: Path = Path("/lib/modules")) -> None:
        self.release = release
        self.directory = root / release
        self._texts: dict[str, str] = {}

    @property
    def exists(self) -> bool:
        """Whether there are modules of this kernel."""
        return (self.directory / "modules.dep").is_file()

    def _text(self, name: str) -> str:
        if name not in self._texts:
            try:
                self._texts[name] = "\n" + (self.directory / name).read_text("utf-8", "replace")
            except FileNotFoundError:
                self._texts[name] = "\n"
        return self._texts[name]

    def lookup(self, name: str) -> tuple[str, ...] | None:
        """Return the file of a module, then those it needs, in reverse order of loading; None: no file."""
        spelling = re.escape(normalize(name)).replace("_", "[-_]")
        text = self._text("modules.dep")
        match = re.search(rf"[\n/]{spelling}\.ko(?:\.\w+)?:", text)
        if match is None:
            return None
        end = text.find("\n", match.end())
        line = text[text.rfind("\n", 0, match.end()) + 1 : end if end >= 0 else len(text)]
        path, _, needed = line.partition(":")
        return (path, *needed.split())

    def is_builtin(self, name: str) -> bool:
        """Return whether a module is built into the kernel."""
        spelling = re.escape(normalize(name)).replace("_", "[-_]")
        return re.search(rf"[\n/]{spelling}\.ko", self._text("modules.builtin")) is not None

    def find(self, modaliases: Iterable[str]) -> Found:
        """Return the drivers for ``modaliases``."""
        modules: dict[str, None] = {}
        builtin: dict[str, None] = {}
        matched: set[str] = set()
        for modalias in sorted(set(modaliases)):
            wanted = _candidates(modalias)
            own = re.compile(rf"alias ({wanted}) (\S+)")
            kernels = re.compile(rf"[\n\0]([^.\0]+)\.alias=({wanted})(?=\0|$)")
            found = [(pattern, name, modules) for pattern, name in own.findall(self._text("modules.alias"))]
            for name, pattern in kernels.findall(self._text("modules.builtin.modinfo")):
                found.append((pattern, name, builtin))
            for pattern, name, kind in found:
                if fnmatch.fnmatchcase(modalias, pattern):
                    kind[normalize(name)] = None
                    matched.add(modalias)
        return Found(tuple(modules), tuple(builtin), frozenset(matched))

    def softdeps(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Return, by the name of a module, the modules to load before, and after it."""
        result: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for line in self._text("modules.softdep").splitlines():
            words = line.split()
            if len(words) < 3 or words[0] != "softdep":
                continue
            lists: dict[str, list[str]] = {"pre:": [], "post:": []}
            current = lists["pre:"]
            for word in words[2:]:
                if word in lists:
                    current = lists[word]
                else:
                    current.append(normalize(word))
            before, after = result.get(normalize(words[1]), ((), ()))
            result[normalize(words[1])] = ((*before, *lists["pre:"]), (*after, *lists["post:"]))
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
    given = {module_name(path): _under_test(path) for path in files}
    infos = {}
    for path in files:
        try:
            info = modinfo(given[module_name(path)])
        except ValueError as error:
            raise KvmpassError(f"{path} is not a kernel module: {error}") from error
        built_for = info.vermagic.split(" ", 1)[0]
        # With symbol versions the kernel itself compares those, not the release.
        if built_for and built_for != tree.release and "modversions" not in info.vermagic and tree.release:
            raise KvmpassError(
                f"{path} was built for kernel {built_for}, the guest's is {tree.release}",
                "build it for the guest's kernel, or name its kernel with --kernel",
            )
        infos[module_name(path)] = info
    patterns = [pattern for info in infos.values() for pattern in info.aliases]
    replaced = {alias for alias in aliases if any(fnmatch.fnmatchcase(alias, pattern) for pattern in patterns)}
    found = tree.find(aliases - replaced)

    softdeps = tree.softdeps()
    order: dict[str, None] = {}
    paths: dict[str, str] = {}
    visiting: set[str] = set()
    needed_by_others = {*found.modules, *map(normalize, extra)}

    def need(name: str) -> None:
        needed_by_others.add(name)
        visit(name)

    def visit(name: str) -> None:
        if name in visiting:
            return
        visiting.add(name)
        needed: list[str] = []
        if name in infos:
            for other in infos[name].depends:
                known = other in infos or tree.lookup(other) or tree.is_builtin(other)
                if tree.exists and not known:
                    raise KvmpassError(
                        f"module {name} depends on {other}, which kernel {tree.release} does not have",
                        "name it with another --module",
                    )
                need(other)
        elif (stock := tree.lookup(name)) is None:
            return
        else:
            paths[name], *needed = stock
        before, after = softdeps.get(name, ((), ()))
        for other in before:
            need(other)
        for file in reversed(needed):
            need(module_name(file))
        order[name] = None
        for other in after:
            need(other)

    for name in (*found.modules, *map(normalize, extra), *infos):
        visit(name)
    modules = [
        Module(name, given[name], under_test=True)
        if name in infos
        else Module(name, decompress(tree.directory / paths[name]))
        for name in order
    ]
    idle = [path for path in files if not _matches(infos[module_name(path)], aliases)] if aliases else []
    idle = [path for path in idle if module_name(path) not in needed_by_others]
    return ModulePlan(tuple(modules), found.matched | replaced, tuple(idle))


def _under_test(path: Path) -> bytes:
    try:
        return decompress(path)
    except FileNotFoundError as error:
        file, blank, parameters = str(path).partition(" ")
        if blank and Path(file).is_file():
            words = " ".join(f"{module_name(file)}.{word}" for word in words_of(parameters))
            error.add_note(
                f"parameters of a module are words of the kernel's command line: --append {shlex.quote(words)}"
            )
        raise


def _matches(info: ModInfo, modaliases: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(alias, pattern) for alias in modaliases for pattern in info.aliases)
