"""The modules of a kernel's build tree, which has none of depmod's tables."""

from __future__ import annotations

import itertools
import mmap
from functools import cached_property
from pathlib import Path

from kvmpass._dataclass import dataclass
from kvmpass.initramfs.modules import ModuleTree, modinfo, module_name


@dataclass(frozen=True, slots=True)
class _Built:
    """A module of the tree."""

    path: str
    depends: list[str]
    aliases: list[str]
    softdeps: list[str]


class BuildTree(ModuleTree):
    """The directory in which a kernel was built (``O=`` of its Makefile).

    The tables come from ``modules.order`` and the modules' ``.modinfo``, as depmod makes them; what is built in is in
    the same files as in ``/lib/modules`` (Documentation/kbuild/kbuild.rst). A module that has not been built is left
    out.
    """

    def __init__(self, directory: Path, release: str) -> None:
        super().__init__(release)
        self.directory = directory

    @property
    def exists(self) -> bool:
        """Whether modules have been built."""
        return bool(self._built)

    @cached_property
    def _built(self) -> dict[str, _Built]:
        found = {}
        for line in super()._text("modules.order").splitlines():
            path = line.removesuffix(".o").removesuffix(".ko") + ".ko"  # .o since Linux 6.3
            if info := _information(self.directory / path):
                depends = [name for text in info.get("depends", ()) for name in text.split(",") if name]
                softdeps, aliases = info.get("softdep", []), info.get("alias", [])
                found[module_name(path)] = _Built(path, depends, aliases, softdeps)
        return found

    def _text(self, name: str) -> str:
        """Return the text of a table of depmod's, with direct dependencies only."""
        if name in ("modules.dep", "modules.alias", "modules.softdep"):
            lines = (self._lines(name, module, built) for module, built in self._built.items())
            return "\n".join(itertools.chain.from_iterable(lines))
        return super()._text(name)

    def _lines(self, table: str, module: str, built: _Built) -> list[str]:
        if table == "modules.alias":
            return [f"alias {alias} {module}" for alias in built.aliases]
        if table == "modules.softdep":
            return [f"softdep {module} {text}" for text in built.softdeps]
        needed = [self._built[other].path for other in map(module_name, built.depends) if other in self._built]
        return [" ".join((f"{built.path}:", *needed))]


def _information(path: Path) -> dict[str, list[str]] | None:
    """Return what a module says of itself; None: it does not exist, or is none. Debug information is not read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return modinfo(data)
    except (FileNotFoundError, ValueError):
        return None
