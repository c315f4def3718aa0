"""What is made when it is first used: names of a package, imported from their modules; regular expressions."""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # for type checkers it is True; Ctrl-C while typing is imported prints a traceback
if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, AnyStr


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


def lazy_pattern(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """Return what ``re.compile`` would, compiled at its first use: that costs as much as importing a module."""
    return _Pattern(text, flags)  # type: ignore[return-value]


class _Pattern:
    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        import re

        value = getattr(re.compile(*self._arguments), name)
        setattr(self, name, value)  # later uses find it here
        return value
