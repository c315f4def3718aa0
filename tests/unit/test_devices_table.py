"""The table in docs/devices.md and the tests behind it are the same list."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from types import FunctionType

import pytest
from support.repository import ROOT


def rows() -> dict[str, str]:
    """Test to QEMU column, one for each row of the first table."""
    table = (ROOT / "docs/devices.md").read_text().split("\n\n")[2].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert all(len(row) == 5 for row in cells)
    return {row[4].strip("`"): row[2] for row in cells}


def identifiers(function: FunctionType) -> Iterator[str]:
    """The test's name, for each of its parameters."""
    sets = (
        [mark for mark in function.pytestmark if mark.name == "parametrize"]
        if hasattr(function, "pytestmark")
        else []
    )
    if not sets:
        yield function.__name__
    for mark in sets:
        for name in mark.kwargs.get("ids", mark.args[1]):
            yield f"{function.__name__}[{name}]"


def lines(function: FunctionType) -> str:
    """The QEMU lines on which it runs."""
    modern = any(mark.kwargs.get("qemu") == "modern" for mark in getattr(function, "pytestmark", ()))
    return "11.1" if modern else "7.2, 11.1"


def test_every_row_has_its_test_and_every_test_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/amdvi")
    module = importlib.import_module("test_devices")
    functions = [each for name, each in vars(module).items() if re.match("test_", name)]
    assert rows() == {name: lines(function) for function in functions for name in identifiers(function)}
