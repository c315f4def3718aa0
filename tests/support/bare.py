"""Objects of the ioctl layer without a descriptor, and the compiled module with functions that tests choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmpass._native import lib


class FakeLib:
    """The compiled module with some functions replaced."""

    def __init__(self, **functions: Callable[..., int]) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)


def bare(kind: type, **attributes: Any) -> Any:
    """An object that its constructor did not make; it owns no descriptor, and is not missed."""
    quiet = type(kind.__name__, (kind,), {"__del__": lambda self: None})
    one = quiet.__new__(quiet)
    one._fd = 1000
    one.__dict__.update(attributes)
    return one
