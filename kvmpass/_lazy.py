"""Names of a package that are imported from their modules when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of ``package``; ``modules``: the names from each module.

    The package imports the same names under ``if TYPE_CHECKING``.
    """
    module_of = {name: module for module, names in modules.items() for name in names}
    space = vars(sys.modules[package])

    def getattribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return space.setdefault(name, getattr(importlib.import_module(module_of[name]), name))

    return sorted(module_of), getattribute, lambda: sorted({*space, *module_of})
