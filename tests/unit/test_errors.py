"""Errors have one form: what failed, on what, why; and a hint that says what to do. The catalogue has every hint."""

from __future__ import annotations

import re
import sys

import pytest
from support.repository import ROOT

from kvmpass.host.doctor import CATALOGUE

sys.path.insert(0, str(ROOT / "scripts"))
from remedies import Unreadable, _Scope, error_classes, raised

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
# Clauses begin with a lower-case letter. These words have a capital of their own.
NAMES = frozenset({"Debian", "Linux"})
# What a hint begins with, as it says what to do: a verb, or a command line.
_VERBS = """
    assign bind boot build check clear disable do enable end free give install keep leave let load look make
    move name open pass place put raise read reboot remove reserve reset run see set stop to try turn unbind
    unmount unplug update use wait write
"""
VERBS = frozenset(_VERBS.split())
COMMANDS = frozenset({"apt-get", "driverctl", "echo", "kvmpass"})
# Notes that say what else happened, and the reason that they are no hints.
CONTEXT = {
    "and afterwards": "further failures of a teardown",
    "and at the same time": "failures of calls that were made together",
    "as before again": "what was rolled back",
    "while the driver": "what was interrupted",
    "RAISED;": "the error that was being raised, and a hint",
}


def wrong(text: str) -> str:
    """What is wrong with the form of a message or a hint; empty if nothing is."""
    first = re.split(r"[\s:]", text, maxsplit=1)[0]
    if text != text.strip() or "\n" in text:
        return "not one line without blanks around it"
    if text.endswith((".", "!", "?", ":", ",", ";")):
        return "ends with a punctuation mark"
    if re.fullmatch(r"[A-Z]|[A-Z][a-z]+", first) and first not in NAMES:
        return "begins like a sentence: a clause after `kvmpass: ` or `hint: ` does not"
    return ""


def says_what_to_do(hint: str) -> bool:
    """Whether a hint begins with a verb or a command, or is none."""
    return re.split(r"[\s:,]", hint)[0] in VERBS | COMMANDS or hint.startswith(tuple(CONTEXT))


def test_the_form_is_held() -> None:
    assert not wrong("0000:01:00.0: group 12 is not viable: 0000:01:00.1 is bound to snd_hda_intel")
    assert not wrong("BDF is named twice")
    assert wrong("Give the guest more.") and wrong("give the guest more.") and wrong("Give the guest more")
    assert says_what_to_do("give the guest more: its kernel needs it")
    assert not says_what_to_do("the guest needs more")


def test_every_message_and_hint_has_the_form() -> None:
    said = [text for error in raised() for text in (error.message, error.remedy) if text]
    said += [
        text
        for check in CATALOGUE
        for template in check.templates
        for text in (template.brief, template.cause, template.remedy)
    ]
    assert len(said) > 400
    assert not {text: wrong(text) for text in said if wrong(text)}


def test_every_hint_says_what_to_do() -> None:
    hints = {error.remedy for error in raised() if error.remedy}
    hints |= {template.remedy for check in CATALOGUE for template in check.templates}
    assert not {hint for hint in hints if not says_what_to_do(hint)}
    assert not {begin for begin in CONTEXT if not any(hint.startswith(begin) for hint in hints)}


def test_every_hint_is_in_the_catalogue() -> None:
    cells = PAGE.replace("&lt;", "<").replace("\\|", "|")
    hinted = {error for error in raised() if error.remedy}
    missing = {error for error in hinted if f"| {error.message or '(any)'} | {error.remedy} |" not in cells}
    assert not missing, "run scripts/troubleshooting.py"


def test_every_exception_class_is_in_the_catalogue() -> None:
    for error in error_classes():
        assert error.__doc__, error
        assert f"| `{error.__name__}` |" in PAGE, "run scripts/troubleshooting.py"


def test_a_hint_that_cannot_be_read_is_an_error() -> None:
    """Else it would be in no catalogue."""
    import ast

    import kvmpass.errors

    with pytest.raises(Unreadable):
        _Scope(kvmpass.errors, None).texts(ast.parse("somewhere.a_text()", mode="eval").body)
