"""The tree says what tests/words.toml says instead of other words."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.repository import ROOT

TABLE = ROOT / "tests/words.toml"
WORDS: list[dict[str, Any]] = tomllib.loads(TABLE.read_text())["words"]
DIRECTORIES = ("kvmpass", "tests", "docs", "scripts", "cffi_build")
KINDS = frozenset({"", ".1", ".c", ".cdef", ".config", ".h", ".json", ".md", ".py", ".pyi", ".sh", ".toml"})
# Two quote the words, one is generated, one is not our text.
SKIPPED = {TABLE, Path(__file__), ROOT / "kvmpass/_native.c", ROOT / "LICENSE"}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text file of the repository."""
    paths = [*ROOT.glob("*"), *(path for name in DIRECTORIES for path in (ROOT / name).rglob("*"))]
    wanted = {path for path in paths if path.suffix in KINDS and path.is_file()} - SKIPPED
    return {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in sorted(wanted)}


def found(pattern: str, text: str) -> Iterator[int]:
    """The lines at which the pattern begins; a blank in it is any blank, or a line break in a comment."""
    blank = r"(?:\s+(?:#|//|\*)?\s*)"
    for match in re.finditer(pattern.replace(" ", blank), text, re.IGNORECASE):
        yield text.count("\n", 0, match.start()) + 1


@pytest.mark.parametrize("entry", WORDS, ids=lambda entry: entry["say"])
def test_other_words_are_used(entry: dict[str, Any], texts: dict[str, str]) -> None:
    allowed = entry.get("except", {})
    hits = [
        f"{name}:{line}"
        for name, text in texts.items()
        if name not in allowed
        for line in found(entry["pattern"], text)
    ]
    assert not hits, f"say: {entry['say']}"


def test_each_exception_is_needed(texts: dict[str, str]) -> None:
    for entry in WORDS:
        for name in entry.get("except", {}):
            assert any(found(entry["pattern"], texts[name])), f"{name}: no {entry['pattern']}"


def test_a_word_is_found_across_lines() -> None:
    assert list(found("must not be kept waiting", "one\n    # it must not be\n    # kept waiting\n")) == [2]
    assert list(found(r"\banew\b", "Anew\nrenewed, a new one\nanew")) == [1, 3]
