"""``kvmpass._dataclass`` refuses at once what the standard library refuses, and what it does not make itself."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import ClassVar

import pytest

import kvmpass
from kvmpass._dataclass import dataclass


class Follows:
    """A field without a default after one with it."""

    first: int = 1
    second: int


class FollowsFactory:
    """The same, after one with a factory."""

    first: list[int] = dataclasses.field(default_factory=list)
    second: int = dataclasses.field(repr=False)


class Mutable:
    """A default that its instances would share."""

    items: list[int] = []  # noqa: RUF012


class MutableField:
    """The same, as a field."""

    items: dict[str, int] = dataclasses.field(default={})


@pytest.mark.parametrize("cls", [Follows, FollowsFactory, Mutable, MutableField])
def test_definitions_that_the_standard_library_refuses(cls: type) -> None:
    with pytest.raises((TypeError, ValueError)) as ours:
        dataclass(frozen=True, slots=True)(cls)
    with pytest.raises(type(ours.value)) as theirs:
        dataclasses.dataclass(frozen=True, slots=True)(cls)
    assert str(ours.value).startswith(str(theirs.value))  # later versions of Python name the earlier field, too


def test_a_field_without_default_after_an_inherited_one_with_it() -> None:
    @dataclass(frozen=True, slots=True)
    class Base:
        last: int = 7

    with pytest.raises(TypeError, match="'more' follows default argument 'last'"):

        @dataclass(frozen=True, slots=True)
        class Further(Base):  # type: ignore[misc]
            more: int


class Keyword:
    """A field that is no argument by position."""

    number: int = dataclasses.field(kw_only=True)


class Keywords:
    """The same, for all that follow."""

    _: dataclasses.KW_ONLY
    number: int


class NoArgument:
    """A field that is no argument."""

    number: int = dataclasses.field(default=1, init=False)


class OwnHash:
    """A field that is compared but has no part in the hash."""

    number: int = dataclasses.field(hash=False)


class Constant:
    """A constant of the class."""

    number: ClassVar[int] = 1


class Initial:
    """An argument that is no field."""

    number: dataclasses.InitVar[int] = 1


@pytest.mark.parametrize("cls", [Keyword, Keywords, NoArgument, OwnHash, Constant, Initial])
def test_definitions_that_are_the_standard_librarys_alone(cls: type) -> None:
    with pytest.raises(TypeError, match=r"number|'_'"):
        dataclass(frozen=True, slots=True)(cls)
    dataclasses.dataclass(frozen=True, slots=True)(cls)


def test_the_package_uses_it_where_it_saves_something() -> None:
    package = Path(kvmpass.__file__).parent
    for path in package.rglob("*.py"):
        source = path.read_text()
        if re.search(r"^@dataclass\(.*slots=True", source, re.MULTILINE):
            assert re.search(r"^from kvmpass._dataclass import dataclass\b", source, re.MULTILINE), path
            assert not re.search(r"^from dataclasses import .*\breplace\b", source, re.MULTILINE), path


def test_each_class_of_the_package_is_one_that_the_standard_library_makes() -> None:
    """What is wrong with a definition is found when the fields are made. Each of them is an argument, as they are."""
    package = Path(kvmpass.__file__).parent
    for path in package.rglob("*.py"):
        if "from kvmpass._dataclass import" not in path.read_text():
            continue
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for cls in vars(importlib.import_module(name)).values():
            if isinstance(cls, type) and cls.__module__ == name and "__defaults__" in vars(cls):
                fields = dataclasses.fields(cls)
                assert [field.name for field in fields] == [*vars(cls)["__defaults__"]] == [*cls.__match_args__]
                assert all(field.init and not field.kw_only and field.hash is None for field in fields), cls
