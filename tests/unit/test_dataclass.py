"""``kvmpass._dataclass`` beside the standard library's: what a class can do is the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from kvmpass._dataclass import dataclass, replace


@dataclass(frozen=True, slots=True)
class Ours:
    """Each kind of field, and a method of its own."""

    number: int
    text: str = "x"
    note: str = dataclasses.field(default="", compare=False)
    secret: str = dataclasses.field(default="", repr=False)
    items: list[int] = dataclasses.field(default_factory=list, compare=False)

    def __str__(self) -> str:
        return f"<{self.number}>"


@dataclass(frozen=True, slots=True)
class Derived(Ours):
    """With one more field."""

    last: int = 7


@dataclass(frozen=True, slots=True)
class Empty:
    """Without fields."""


@dataclass(frozen=True, slots=True)
class Checked:
    """With a check, and a text of its own."""

    low: int

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError(self.low)

    def __repr__(self) -> str:
        return "checked"


def theirs(cls: type) -> Any:
    """Return the standard library's class of the same definition."""
    space = {
        name: value
        for name, value in vars(cls).items()
        if name in ("__annotations__", "__str__", "__post_init__", "__module__", "__qualname__")
    }
    space |= {field.name: field for field in dataclasses.fields(cls) if field.name in cls.__annotations__}
    return dataclasses.dataclass(frozen=True, slots=True)(type(cls.__name__, (), space))


def ours(cls: type) -> Any:
    """Return a class of the same definition that has not been used."""
    space = {name: value for name, value in vars(theirs(cls)).items() if name in ("__annotations__", "__qualname__")}
    space |= {field.name: field for field in dataclasses.fields(cls)}
    return dataclass(frozen=True, slots=True)(type(cls.__name__, (), space))


@pytest.mark.parametrize(
    "arguments", [(1,), (2, "y"), (1, "x", "note"), (1, "x", "", "secret"), (1, "x", "", "", [3])]
)
def test_equality_hash_and_text(arguments: tuple[Any, ...]) -> None:
    other = theirs(Ours)
    for reference in ((1,), (1, "x", "", "secret"), (2, "y")):
        assert (Ours(*arguments) == Ours(*reference)) == (other(*arguments) == other(*reference))
    assert hash(Ours(*arguments)) == hash(other(*arguments))
    assert repr(Ours(*arguments)) == repr(other(*arguments))
    assert str(Ours(*arguments)) == f"<{arguments[0]}>"


def test_another_class_is_never_equal() -> None:
    assert Ours(1) != Derived(1)
    assert Ours(1) != (1, "x", "")
    assert Empty() == Empty()
    assert hash(Empty()) == hash(())
    assert repr(Empty()) == "Empty()"


def test_nothing_can_be_changed() -> None:
    made: Any = Derived(1)
    for name in ("number", "last"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(made, name, 2)
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            delattr(made, name)
    with pytest.raises(AttributeError):
        made.other = 2
    assert not hasattr(made, "__dict__")
    assert made == Derived(1)


def test_the_standard_librarys_functions() -> None:
    made = Derived(1, items=[2])
    for function in (dataclasses.replace, replace):
        changed = function(made, last=8)
        assert changed == Derived(1, last=8) and changed.items is made.items and type(changed) is Derived
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            function(made, other=1)
    assert dataclasses.asdict(made) == {
        "number": 1, "text": "x", "note": "", "secret": "", "items": [2], "last": 7
    }  # fmt: skip
    assert [field.name for field in dataclasses.fields(made)][-1] == "last"
    assert copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)) == made
    match made:
        case Derived(number, text):
            assert (number, text) == (1, "x")


def test_what_a_class_defines_stays() -> None:
    assert repr(Checked(1)) == "checked"
    with pytest.raises(ValueError, match="-1"):
        Checked(-1)


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((1,), {}),
        ((1, "y"), {"items": [2]}),
        ((1, "y", "note", "secret", [2]), {}),
        ((), {"text": "y", "number": 1}),
        ((), {"secret": "s", "items": [2], "note": "n", "text": "t", "number": 1}),
        ((), {}),
        ((), {"text": "y"}),
        ((1,), {"number": 1}),
        ((1,), {"other": 1}),
        ((), {"number": 1, "other": 1}),
        ((1, "y", "note", "secret", [2], 6), {}),
        ((1, "y", "note", "secret", [2], 6), {"text": "y"}),
    ],
)
def test_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same are taken, and others are refused in the same words, before and after the class is complete."""

    def result(cls: Any) -> object:
        try:
            made = cls(*args, **kwargs)
        except TypeError as error:
            return str(error)
        return [getattr(made, name) for name in ("number", "text", "note", "secret", "items")]

    fresh = ours(Ours)
    assert result(fresh) == result(theirs(Ours))
    assert [field.name for field in dataclasses.fields(fresh)] == ["number", "text", "note", "secret", "items"]
    assert result(fresh) == result(theirs(Ours))


def test_what_a_factory_makes_is_no_others() -> None:
    cls = ours(Ours)
    assert cls(1).items is not cls(1).items
    given: list[int] = []
    assert cls(1, items=given).items is given


def test_fields_of_the_bases_come_first() -> None:
    @dataclass(frozen=True, slots=True)
    class Base:
        first: int
        second: int = 2

    @dataclass(frozen=True, slots=True)
    class Other:
        third: int = 3

    @dataclass(frozen=True, slots=True)
    class Further(Base):
        second: int = 20
        fourth: int = 4

        def __post_init__(self) -> None:
            object.__setattr__(self, "fourth", self.fourth + self.second)

    class Plain(Further):
        __slots__ = ()

    made = Further(1)
    assert (made.first, made.second, made.fourth) == (1, 20, 24)
    assert repr(Further(1, 5, 6)) == f"{Further.__qualname__}(first=1, second=5, fourth=11)"
    assert Further.__match_args__ == ("first", "second", "fourth")
    assert Plain(first=1) == Plain(1) != made
    with pytest.raises(TypeError, match="unexpected keyword argument 'third'"):
        Plain(1, third=1)  # type: ignore[call-arg]
    assert [field.name for field in dataclasses.fields(Further)] == ["first", "second", "fourth"]
    assert Base(1) == Base(1, 2) and Other() == Other(3)


def test_an_init_of_its_own() -> None:
    @dataclass(slots=True)
    class Own:
        number: int

        def __init__(self, text: str) -> None:
            self.number = int(text)

    @dataclass(slots=True)
    class Calling(Ours):  # type: ignore[misc]
        more: int = 0

        def __init__(self) -> None:
            Ours.__init__(self, 1)
            object.__setattr__(self, "more", 2)

    assert Own("3").number == 3
    assert [field.name for field in dataclasses.fields(Own)] == ["number"]
    made = Calling()
    assert (made.number, made.text, made.more) == (1, "x", 2)


def test_one_that_can_change() -> None:
    @dataclass(slots=True)
    class Changing:
        number: int
        items: list[int] = dataclasses.field(default_factory=list)

    made = Changing(1)
    made.number = 2
    assert made == Changing(2)
    assert made.items is not Changing(2).items
    with pytest.raises(TypeError, match="unhashable"):
        hash(made)


def test_one_that_is_compared_by_identity() -> None:
    @dataclass(eq=False, repr=False, slots=True)
    class Only:
        number: int

    made = Only(1)
    assert made != Only(1)
    assert {made: 1}[made] == 1
    assert "Only object" in repr(made)


def test_order() -> None:
    @dataclass(frozen=True, slots=True, order=True)
    class Ordered:
        high: int
        low: int = 0
        note: str = dataclasses.field(default="", compare=False)

    low, high = Ordered(1, 2), Ordered(2, 1)
    assert low < high and low <= high and high > low and high >= low
    assert not (high < low or high <= low or low > high or low >= high)
    assert Ordered(1, 2, "x") <= low <= Ordered(1, 2, "y")
    assert sorted([high, low]) == [low, high]
    with pytest.raises(TypeError):
        _ = low < (2, 1)  # type: ignore[operator]


def test_other_options_are_the_standard_librarys() -> None:
    @dataclass(kw_only=True)
    class Keywords:
        number: int

    assert Keywords(number=1) == Keywords(number=1)
    assert vars(Keywords(number=1)) == {"number": 1}


def test_instances_of_the_standard_librarys_classes_are_changed_too() -> None:
    @dataclass(frozen=True)
    class Plain:
        number: int
        text: str = "x"

    @dataclasses.dataclass(frozen=True)
    class Inheriting(Derived):
        more: int = 1

    class Further(Derived):
        pass

    assert replace(Plain(1), number=2) == Plain(2)
    assert replace(Inheriting(1), more=2) == Inheriting(1, more=2)
    assert replace(Further(1), last=2) == Further(1, last=2)


def test_instances_are_made_changed_and_compared_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = ours(Ours)
    monkeypatch.setattr(dataclasses, "dataclass", None)
    assert replace(cls(1, items=[2]), number=3) == cls(3)
    assert "number=3" in repr(cls(3)) and hash(cls(3)) == hash(cls(3))
    monkeypatch.undo()
    assert len(dataclasses.fields(cls)) == 5


def test_a_class_is_complete_when_it_is_first_used() -> None:
    """By its fields, by a class that inherits from it, and by many threads at once."""

    def make() -> Any:
        @dataclass(frozen=True, slots=True)
        class Late:
            number: int
            items: list[int] = dataclasses.field(default_factory=list)

        return Late

    made = make()
    assert dataclasses.is_dataclass(made)
    assert [field.name for field in dataclasses.fields(made)] == ["number", "items"]
    assert made.__match_args__ == ("number", "items")
    for _ in range(20):
        late = make()
        with ThreadPoolExecutor(8) as pool:
            for instance in pool.map(lambda number, late=late: late(number), range(8)):  # type: ignore[misc]
                assert instance.items == []
        assert dataclasses.replace(late(1), number=3) == late(3)


def interrupted(use: Callable[[], object], line: int, interrupt: Callable[[], None]) -> bool:
    """Call ``interrupt`` at a line that ``use`` runs of this module's or of the library's; return whether it did."""
    left, before = line, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename.endswith(("/_dataclass.py", "/dataclasses.py")) and event == "line":
            left -= 1
            if left == -1:
                sys.settrace(before)
                interrupt()
        return trace

    sys.settrace(trace)
    try:
        use()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:  # so Python passes on what is raised in a ``__set_name__``
        assert isinstance(error.__cause__, KeyboardInterrupt)
    finally:
        sys.settrace(before)
    return left < 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("raises", [True, False], ids=["raises", "uses the class"])
def test_a_signal_handler_interrupts_the_first_use(frozen: bool, raises: bool) -> None:
    """At any line: the class can be used afterwards, as teardown does, and in the handler."""

    def check(made: Any) -> None:
        assert made(1) == made(1, items=[]) != made(2)
        assert [field.name for field in dataclasses.fields(made)] == ["number", "text", "items"]
        assert made.__match_args__ == ("number", "text", "items")
        assert made.__dataclass_params__.frozen is frozen
        with pytest.raises(TypeError, match=re.escape("Made.__init__() missing 1 required")):
            made()

    for line in range(0, 10_000, 3):

        @dataclass(frozen=frozen, slots=True)
        class Made:
            number: int
            text: str = "x"
            items: list[int] = dataclasses.field(default_factory=list)

        def interrupt(made: Any = Made) -> None:
            if raises:
                raise KeyboardInterrupt
            check(made)

        def use(made: Any = Made) -> None:
            made(1)
            dataclasses.fields(made)

        reached = interrupted(use, line, interrupt)
        check(Made)
        if not reached:
            break
    assert line > 100
