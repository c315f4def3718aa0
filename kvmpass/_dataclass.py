"""``dataclass``: that of the standard library, whose frozen classes with slots cost a fourth to make.

``kvmpass assign`` imports a hundred of them, for each of which the standard library compiles six functions: 30 ms in
all. One is needed, ``__init__``; the others are the same for every class here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers this is the standard library's
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: type | None = None, **options: bool) -> Any:
        """Return what ``dataclasses.dataclass`` would: fields, equality, hash and text; frozen where that is set."""
        if options != {"frozen": True, "slots": True}:
            return dataclasses.dataclass(cls, **options)
        return _frozen


def _frozen(cls: type) -> Any:
    """Make ``cls`` a frozen dataclass with slots; what it defines itself stays."""
    own = set(vars(cls))
    made: Any = dataclasses.dataclass(repr=False, eq=False, slots=True)(cls)
    fields = dataclasses.fields(made)
    shown = [field.name for field in fields if field.repr]
    compared = _getter([field.name for field in fields if field.compare])

    def __eq__(self: Any, other: object) -> bool:
        return compared(self) == compared(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(compared(self))

    def __repr__(self: Any) -> str:
        return f"{self.__class__.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __setattr__(self: Any, name: str, value: object) -> None:
        if hasattr(self, name):  # __init__ has set it
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def __delattr__(self: Any, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    for method in (__eq__, __hash__, __repr__, __setattr__, __delattr__):
        if method.__name__ not in own:
            setattr(made, method.__name__, method)
    return made


def _getter(names: list[str]) -> Callable[[Any], Any]:
    return attrgetter(*names) if names else lambda _: ()
