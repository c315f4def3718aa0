"""Every command line that the documentation shows is one that kvmpass takes, as far as its options say."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.repository import ROOT

from kvmpass.cli.main import COMMANDS, kvmpass, split_command

PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^ *```(?:console|sh|yaml)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# At a prompt, in a script, in a step of a job.
_LINE = re.compile(rf"^[^#'\"]*?(?:^ *#|[$&|:-]|sudo|^) *(kvmpass (?:{'|'.join(COMMANDS)})(?= |$).*)", re.MULTILINE)
_NOT_ONE = re.compile(r"[…{]")  # a part of one, or for what is known later
_OF_SHELL = {"|", "||", "&&", ";", "&", ">", ">>", "<", "(", ")"}
# What stands for a value that has a form.
_VALUES = {"BDF": "0000:01:00.0", "$BDF": "0000:01:00.0", "$DRIVE": "0000:01:00.0", "$CARD": "0000:02:00.0"}
_VALUES |= {
    "$VF": "0000:01:10.0",
    "$TOKEN": "d9b7c1a6-0b5e-4b6e-9d0f-6c5b1b1d4f10",
    "host.tar.gz": str(ROOT),
    "~/linux": str(ROOT),
}


def lines(page: Path) -> Iterator[str]:
    for block in _BLOCK.findall(page.read_text()):
        yield from _LINE.findall(block.replace("\\\n", " "))


def words_of(line: str) -> list[str]:
    """The words up to what belongs to the shell, or to a comment. A quoted one may go on in the next line."""
    lexer = shlex.shlex(line if line.count("'") % 2 == 0 else f"{line}'", posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(itertools.takewhile(lambda word: word not in _OF_SHELL, lexer))
    return [_VALUES.get(word, word) for word in words[1:]]


def shown() -> list[tuple[str, list[str]]]:
    found = [(page.name, line) for page in PAGES for line in lines(page)]
    return [(page, words_of(line)) for page, line in found if not _NOT_ONE.search(line)]


def parse(words: list[str]) -> None:
    """Raise ``click.UsageError`` for words that the command does not take."""
    options, command = split_command(words)
    context = kvmpass.make_context("kvmpass", options[:1], resilient_parsing=True)
    found: click.Command | None = kvmpass.get_command(context, options[0])
    rest = options[1:]
    while isinstance(found, click.Group) and rest:
        found, rest = found.get_command(context, rest[0]), rest[1:]
    assert found is not None, options
    with found.make_context(found.name, rest, parent=context, obj=command):
        pass
    if command and command[0] == "kvmpass":
        parse(command[1:])


@pytest.mark.parametrize(("page", "words"), shown(), ids=lambda value: value if isinstance(value, str) else None)
def test_it_is_taken(page: str, words: list[str]) -> None:
    parse(words)


def test_the_lines_are_found() -> None:
    """With what a shell makes of them, and of a job."""
    words = [words for _, words in shown()]
    assert ["exec", "-i", "lab", "--", "sha256sum"] in words
    assert ["exec", "--timeout", "300", "ci", "--", "sh", "/tmp/test.sh"] in words
    assert len(words) > 70
    with pytest.raises(click.UsageError):
        parse(["list", "--no-such-option"])
