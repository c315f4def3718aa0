"""``dataclass``: that of the standard library, whose classes with slots cost many times as much to make.

``kvmpass assign`` imports eighty of them, for each of which the standard library compiles up to eight functions. Here
the methods are the same for every class, or closures over its fields, and nothing is compiled. The standard library
makes the rest when it is first used: what ``dataclasses.fields`` returns, and an ``__init__`` that says which
arguments are wrong. It is not loaded before that.
"""

from __future__ import annotations

import sys
from _thread import RLock
from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers these are the standard library's
    from dataclasses import dataclass as dataclass
    from dataclasses import replace as replace
else:

    def dataclass(cls: type | None = None, **options: bool) -> Any:
        """Return what ``dataclasses.dataclass`` would: fields, equality, hash and text; frozen where that is set.

        With ``slots`` each field is an argument, by position and name, and has no ``hash`` of its own. Raises
        ``TypeError`` for other definitions, and what the standard library does: ``ValueError`` for a mutable default.
        """
        if not options.get("slots") or options.keys() - _OPTIONS:
            import dataclasses

            return dataclasses.dataclass(cls, **options)
        return partial(_make, **options)

    def replace(instance: Any, /, **changes: Any) -> Any:
        """Return what ``dataclasses.replace`` would: of an instance whose class was made here, without its fields."""
        cls = instance.__class__
        defaults = vars(cls).get("__defaults__")
        if defaults is None:
            import dataclasses

            return dataclasses.replace(instance, **changes)
        return cls(**{name: getattr(instance, name) for name in defaults} | changes)


_OPTIONS = {"slots", "frozen", "eq", "repr", "order"}
_NO_FIELDS = {"ClassVar", "InitVar", "KW_ONLY"}  # annotations; those of every module here are text
_OWN = ("__dict__", "__weakref__")  # descriptors of one class, not of its copy
_MISSING = object()  # in the place of a default
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
    # Of every field, in the order of the arguments: a value, a Field, or _MISSING. The bases come first.
    defaults: dict[str, Any] = {}
    inherited: set[str] = set()
    for base in cls.__mro__[-2:0:-1]:
        defaults |= vars(base).get("__defaults__", {})
        inherited.update(vars(base).get("__slots__", ()))
    for name, annotation in names.items():
        if str(annotation).partition("[")[0].rpartition(".")[2] in _NO_FIELDS:
            raise TypeError(f"{name!r} of {cls.__qualname__} is no field: {annotation}")
        defaults[name] = space.pop(name, _MISSING)
    _check(defaults)
    for name in _OWN:
        space.pop(name, None)
    space["__slots__"] = [name for name in names if name not in inherited]
    space["__defaults__"] = defaults
    methods = _methods(frozen, eq, repr, order)
    made: Any = type(cls)(cls.__name__, cls.__bases__, {**methods, "__match_args__": (*defaults,), **space})
    made.__qualname__ = cls.__qualname__
    done = False

    def complete() -> None:
        nonlocal done
        with _lock:
            if not done:
                # A signal handler may raise anywhere in here, or use the class, which begins again: the standard
                # library changes a copy, and what makes the next use come here is replaced last.
                import dataclasses

                copied = {name: value for name, value in vars(cls).items() if name not in _OWN}
                full: Any = type(cls)(cls.__name__, cls.__bases__, copied)
                full.__qualname__ = cls.__qualname__
                full = dataclasses.dataclass(repr=False, eq=False, frozen=frozen)(full)
                for name in ("__dataclass_params__", "__init__", "__dataclass_fields__"):
                    if name not in space:
                        setattr(made, name, vars(full)[name])
                done = True

    made.__dataclass_fields__ = _Fields(complete, made)
    if "__init__" not in space:
        made.__init__ = _initializer(made, defaults, complete)
    return made


def _field_type() -> Any:
    """Return ``dataclasses.Field`` for ``isinstance``, or ``()`` before it exists: then no default is one."""
    return getattr(sys.modules.get("dataclasses"), "Field", ())


def _given(value: Any) -> bool:
    """Whether a value of a ``Field`` is set."""
    return value is not sys.modules["dataclasses"].MISSING


def _check(defaults: dict[str, Any]) -> None:
    """Raise what the standard library would, later; and ``TypeError`` for what has no effect here."""
    optional = ""
    field = _field_type()
    for name, default in defaults.items():
        value = default
        if isinstance(default, field):
            if not default.init or default.kw_only is True or default.hash is not None:
                raise TypeError(f"field {name!r} has init, kw_only or hash: use dataclasses.dataclass")
            value = None if _given(default.default_factory) else default.default
            value = value if _given(value) else _MISSING
        if value is not _MISSING:
            optional = name
        elif optional:
            raise TypeError(f"non-default argument {name!r} follows default argument {optional!r}")
        kind = value.__class__
        if kind.__hash__ is None:
            raise ValueError(f"mutable default {kind} for field {name} is not allowed: use default_factory")


def _initializer(made: Any, defaults: dict[str, Any], complete: Callable[[], None]) -> Callable[..., None]:
    """Return ``__init__`` of ``made``."""
    setters = [getattr(made, name).__set__ for name in defaults]  # of its slots: also a frozen one is set by them
    constants: dict[str, Any] = {}
    factories: dict[str, Callable[[], Any]] = {}
    field = _field_type()
    for name, default in defaults.items():
        value = default
        if isinstance(default, field):
            if _given(default.default_factory):
                factories[name] = default.default_factory
            value = default.default if _given(default.default) else _MISSING
        if value is not _MISSING:
            constants[name] = value
    check = getattr(made, "__post_init__", None)
    names = list(defaults)
    required = max((number for number, name in enumerate(names, 1) if name not in constants), default=0)
    rest = tuple(constants.get(name) for name in names)

    def complete_values(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if not kwargs and required <= len(args) <= len(setters):
            return args + rest[len(args) :]
        if not args and kwargs.keys() == defaults.keys():
            return tuple(map(kwargs.__getitem__, names))
        given = dict(zip(defaults, args, strict=False)) | kwargs
        known = constants | given
        if len(given) != len(args) + len(kwargs) or known.keys() | factories.keys() != defaults.keys():
            complete()
            made.__init__(self, *args, **kwargs)  # now the standard library's: it raises TypeError
        return tuple(known[name] if name in known else factories[name]() for name in defaults)

    count = len(setters)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        values = args if len(args) == count and not kwargs else complete_values(self, args, kwargs)
        for setter, value in zip(setters, values):  # noqa: B905 - to check it takes a fifth of the time
            setter(self, value)
        if check is not None:
            self.__post_init__()

    return __init__


@cache
def _methods(frozen: bool, eq: bool, repr: bool, order: bool) -> dict[str, Any]:
    methods = _FROZEN if frozen else {}
    if eq:
        methods = methods | _EQUAL | ({} if frozen else {"__hash__": None})
    return methods | (_TEXT if repr else {}) | (_ORDER if order else {})


@cache
def _compared(cls: Any) -> Callable[[Any], Any]:
    field = _field_type()
    names = [name for name, default in cls.__defaults__.items() if not isinstance(default, field) or default.compare]
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
    defaults, field = self.__class__.__defaults__, _field_type()
    shown = [name for name, default in defaults.items() if not isinstance(default, field) or default.repr]
    return f"{self.__class__.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _set(self: Any, name: str, value: object) -> None:
    if hasattr(self, name):  # else it is a copy, which is being made
        import dataclasses

        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
    object.__setattr__(self, name, value)


def _delete(self: Any, name: str) -> None:
    import dataclasses

    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


_FROZEN: dict[str, Any] = {"__setattr__": _set, "__delattr__": _delete}
_EQUAL: dict[str, Any] = {"__eq__": _equal, "__hash__": _hash}
_TEXT: dict[str, Any] = {"__repr__": _text}
# Python tries the other operand's mirrored method for > and >=.
_ORDER: dict[str, Any] = {"__lt__": _less, "__le__": _not_greater}
