"""Tables and folded lines that fit the terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

import click

GAP = "  "


def width() -> int | None:
    """``$COLUMNS``, else the columns of the terminal on standard output; None (no limit) if there is no terminal."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None  # 0 on a serial line
    except (OSError, ValueError):
        return None


def length(text: str) -> int:
    """Return the width of ``text`` in columns, without its escape sequences for colour."""
    return len(click.unstyle(text))


def widths(rows: Iterable[Sequence[str]]) -> list[int]:
    """Return the width of each column of ``rows``, which all have the same number of them."""
    return [max(map(length, column)) for column in zip(*rows, strict=True)]


def columns(row: Sequence[str], sizes: Sequence[int], right: frozenset[int] = frozenset()) -> str:
    """One line of a table; ``right`` has the numbers of the columns that are aligned to the right."""
    cells = []
    for number, (cell, size) in enumerate(zip(row, sizes, strict=True)):
        pad = " " * (size - length(cell))
        cells.append(pad + cell if number in right else cell + pad)
    return GAP.join(cells).rstrip()


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> Iterator[str]:
    """Yield the lines of a table; ``right`` is that of :func:`columns`."""
    sizes = widths(rows)
    yield from (columns(row, sizes, right) for row in rows)


def count(number: int, noun: str) -> str:
    """Return ``1 device``, ``2 devices``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def fold(text: str, first: str, rest: str) -> list[str]:
    """Fold ``text`` to the terminal's width; the first line begins with ``first``, the others with ``rest``.

    Blanks and ``- `` at the beginning of the text also indent the lines that follow.
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
    """Return the text in a dim colour."""
    return click.style(text, dim=True)
