"""``dataclass``: that of the standard library, whose classes with slots cost twenty times as much to make.

``kvmpass assign`` imports a hundred of them, for each of which the standard library compiles up to eight functions.
Here the methods are the same for every class; fields and ``__init__`` are made by the standard library when a class
is first used: in most runs half of them are not.
"""

from __future__ import annotations

import dataclasses
from _thread import RLock
from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers this is the standard library's
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: type | None = None, **options: bool) -> Any:
        """Return what ``dataclasses.dataclass`` would: fields, equality, hash and text; frozen where that is set."""
        if not options.get("slots") or options.keys() - _OPTIONS:
            return dataclasses.dataclass(cls, **options)
        return partial(_make, **options)


_OPTIONS = {"slots", "frozen", "eq", "repr", "order"}
_OWN = ("__dict__", "__weakref__")  # descriptors of one class, not of its copy
_lock = RLock()  # a class's bases are completed with it


class _Fields:
    """The fields of a class that is not complete: the first access makes them."""

    def __init__(self, complete: Callable[[], None], made: type) -> None:
        self._complete, self._made = complete, made

    def __get__(self, instance: object, owner: type) -> Any:
        self._complete()
        return vars(self._made)["__dataclass_fields__"]


def _make(
    cls: type, *, slots: bool, frozen: bool = False, eq: bool = True, repr: bool = True, order: bool = False
) -> Any:
    """Make ``cls`` a dataclass with slots; what it defines itself stays."""
    space = dict(vars(cls))
    names = space.get("__annotations__", {})
    methods = (
        (_FROZEN if frozen else {}) | (_EQUAL if eq else {}) | (_TEXT if repr else {}) | (_ORDER if order else {})
    )
    if eq and not frozen:
        methods["__hash__"] = None
    for name in (*_OWN, *names):
        space.pop(name, None)
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__slots__", ())}
    space["__slots__"] = tuple(name for name in names if name not in inherited)
    made: Any = type(cls)(cls.__name__, cls.__bases__, methods | space)
    made.__qualname__ = cls.__qualname__
    done = False

    def complete() -> None:
        nonlocal done
        with _lock:
            if not done:
                # A signal handler may raise anywhere in here, or use the class, which begins again: the standard
                # library changes a copy, and what makes the next use come here is replaced last.
                copied = {name: value for name, value in vars(cls).items() if name not in _OWN}
                full: Any = type(cls)(cls.__name__, cls.__bases__, copied)
                full.__qualname__ = cls.__qualname__
                full = dataclasses.dataclass(repr=False, eq=False, frozen=frozen)(full)
                for name in ("__match_args__", "__dataclass_params__", "__dataclass_fields__", "__init__"):
                    if name not in space:
                        setattr(made, name, vars(full)[name])
                done = True

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        complete()
        made.__init__(self, *args, **kwargs)

    made.__dataclass_fields__ = _Fields(complete, made)
    if "__init__" not in space:
        made.__init__ = __init__
    return made


@cache
def _compared(cls: Any) -> Callable[[Any], Any]:
    names = [field.name for field in dataclasses.fields(cls) if field.compare]
    return attrgetter(*names) if names else lambda _: ()


def _equal(self: Any, other: object) -> bool:
    compared = _compared(self.__class__)
    return compared(self) == compared(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self.__class__)(self))


def _less(self: Any, other: Any) -> bool:
    compared = _compared(self.__class__)
    return compared(self) < compared(other) if other.__class__ is self.__class__ else NotImplemented


def _not_greater(self: Any, other: Any) -> bool:
    compared = _compared(self.__class__)
    return compared(self) <= compared(other) if other.__class__ is self.__class__ else NotImplemented


def _text(self: Any) -> str:
    shown = [field.name for field in dataclasses.fields(self) if field.repr]
    return f"{self.__class__.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _set(self: Any, name: str, value: object) -> None:
    if hasattr(self, name):  # else it is a copy, which is being made
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
    object.__setattr__(self, name, value)


def _delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


_FROZEN: dict[str, Any] = {"__setattr__": _set, "__delattr__": _delete}
_EQUAL: dict[str, Any] = {"__eq__": _equal, "__hash__": _hash}
_TEXT: dict[str, Any] = {"__repr__": _text}
# Python tries the other operand's mirrored method for > and >=.
_ORDER: dict[str, Any] = {"__lt__": _less, "__le__": _not_greater}
