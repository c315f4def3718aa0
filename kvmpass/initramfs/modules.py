"""Kernel modules for a device: from its modalias to files in the order of loading.

Reads what depmod wrote (modules.alias, .dep, .softdep, .builtin, .builtin.modinfo; depmod.d(5), modules.dep(5)) and
``.modinfo`` sections of files under test. No kmod needed.
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
    """Module names know no difference between ``-`` and ``_``."""
    return name.replace("-", "_")


def module_name(path: str | Path) -> str:
    """``kernel/drivers/net/e1000e.ko.xz`` → ``e1000e``."""
    return normalize(Path(path).name.split(".ko", 1)[0])


def decompress(path: Path) -> bytes:
    """The module as the kernel wants it, whatever its compression. Raises ``KvmpassError`` for a broken file."""
    data = path.read_bytes()
    try:
        if data[:6] == b"\xfd7zXZ\0":
            data = lzma.decompress(data)
        elif data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard

            # The stream interface: a frame need not say how long its content is.
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except Exception as error:
        raise KvmpassError(f"{path}: cannot be decompressed: {error}") from error
    if not elf.is_elf(data):
        raise KvmpassError(f"{path} is not a kernel module for x86-64")
    return data


@dataclass(frozen=True, slots=True)
class Module:
    """One module to load: ``data`` is decompressed; ``under_test`` if the user gave the file."""

    name: str
    data: bytes
    under_test: bool = False


@dataclass(frozen=True, slots=True)
class ModInfo:
    """What a module file says about itself."""

    aliases: tuple[str, ...]
    depends: tuple[str, ...]
    vermagic: str


def modinfo(data: bytes) -> ModInfo:
    """Parse ``.modinfo``: zero-separated ``key=value`` texts. Raises ``ValueError`` if it is not there."""
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
    """A regular expression for the alias patterns that agree with ``modalias`` up to their first wildcard.

    The tables have tens of thousands of lines: this leaves a handful of them for ``fnmatch``. Twenty characters are
    enough to tell PCI vendors and devices apart.
    """
    bus, colon, rest = modalias.partition(":")
    expression = r"[^\s\0]*"
    for letter in reversed(rest[:20]):
        expression = rf"(?:[*?\[][^\s\0]*|{re.escape(letter)}{expression})"
    return re.escape(bus + colon) + expression


@dataclass(frozen=True, slots=True)
class Found:
    """The modules that a kernel's tables name for some modaliases; ``builtin`` need no file."""

    modules: tuple[str, ...]
    builtin: tuple[str, ...]
    matched: frozenset[str]  # the modaliases for which there is a driver


class ModuleTree:
    """``/lib/modules/RELEASE``. The tables are read when first needed; a missing directory is an empty tree."""

    def __init__(self, release: str, root: Path = Path("/lib/modules")) -> None:
        self.release = release
        self.directory = root / release
        self._texts: dict[str, str] = {}

    @property
    def exists(self) -> bool:
        return (self.directory / "modules.dep").is_file()

    def _text(self, name: str) -> str:
        if name not in self._texts:
            try:
                self._texts[name] = "\n" + (self.directory / name).read_text("utf-8", "replace")
            except FileNotFoundError:
                self._texts[name] = "\n"
        return self._texts[name]

    def lookup(self, name: str) -> tuple[str, ...] | None:
        """The file of a module, then the files it needs, the one to load first last; ``None`` if it has none."""
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
        spelling = re.escape(normalize(name)).replace("_", "[-_]")
        return re.search(rf"[\n/]{spelling}\.ko", self._text("modules.builtin")) is not None

    def find(self, modaliases: Iterable[str]) -> Found:
        """The drivers whose alias patterns match."""
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
        """For each module that has some: modules to load before, and after it."""
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
    """What the guest loads, in order, and the modaliases that will then have a driver.

    ``idle``: the user's files that are for none of the modaliases, and that nothing else needs.
    """

    modules: tuple[Module, ...]
    matched: frozenset[str]
    idle: tuple[Path, ...] = ()


def plan(
    tree: ModuleTree, modaliases: Iterable[str], files: Sequence[Path] = (), extra: Iterable[str] = ()
) -> ModulePlan:
    """Stock modules for ``modaliases`` and ``extra`` (by name), and the user's ``files`` after what they depend on.

    A file whose alias matches a modalias replaces the stock drivers of that device, and a file replaces the stock
    module of its own name. Raises ``KvmpassError`` for a file that is no module, was built for another kernel, or
    depends on what is nowhere.
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
    taken = {alias for alias in aliases if any(fnmatch.fnmatchcase(alias, pattern) for pattern in patterns)}
    found = tree.find(aliases - taken)

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
    return ModulePlan(tuple(modules), found.matched | taken, tuple(idle))


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
