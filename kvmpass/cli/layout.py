"""Text for people: columns and labelled facts that fit the terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence

import click

GAP = "  "


def width() -> int | None:
    """Columns of the terminal on standard output, or ``$COLUMNS``; None in a pipe: lines of any length."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None  # a serial line says 0
    except (OSError, ValueError):
        return None


def length(text: str) -> int:
    """How many columns ``text`` takes, without its colours."""
    return len(click.unstyle(text))


def widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """The width of each column of ``rows``, which all have the same number of them."""
    return [max(map(length, column)) for column in zip(*rows, strict=True)]


def columns(row: Sequence[str], sizes: Sequence[int], right: frozenset[int] = frozenset()) -> str:
    """One line of a table; ``right`` names the columns that are aligned to the right."""
    cells = []
    for number, (cell, size) in enumerate(zip(row, sizes, strict=True)):
        pad = " " * (size - length(cell))
        cells.append(pad + cell if number in right else cell + pad)
    return GAP.join(cells).rstrip()


def fold(text: str, first: str, rest: str) -> list[str]:
    """``text`` over as many lines as the terminal needs; ``first`` and ``rest`` begin its lines.

    Blanks and ``- `` at the beginning of the text indent the lines that follow, too.
    """
    limit = width()
    if limit is None or length(first) + length(text) <= limit:
        return [first + text]
    own = len(text) - len(text.lstrip(" -"))
    rest += " " * own
    room = max(limit - max(length(first) + own, length(rest)), 20)
    lines = textwrap.wrap(text[own:], room, break_long_words=False, break_on_hyphens=False) or [""]
    return [first + text[:own] + lines[0], *(rest + line for line in lines[1:])]


def dim(text: str) -> str:
    return click.style(text, dim=True)
