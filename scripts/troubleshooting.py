#!/usr/bin/env python3
"""Writes docs/troubleshooting.md from the catalogue of ``kvmpass doctor`` and from what the code raises."""

from __future__ import annotations

import re
import sys
import textwrap
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from remedies import error_classes, raised

from kvmpass.host import BlockerTemplate
from kvmpass.host.doctor import CATALOGUE, Check

FILE = Path(__file__).parents[1] / "docs/troubleshooting.md"
INTRODUCTION = """\
<!-- Made by scripts/troubleshooting.py from the checks in kvmpass/host and from what the code raises. -->

# Troubleshooting

`kvmpass doctor` runs the checks below; with a PCI address (`kvmpass doctor 0000:01:00.0`) also those of the device.
It changes nothing. Root can read more. A failure blocks assignment, a warning does not. A check that depends on a
failed one is skipped: fix it and run doctor again. `kvmpass assign` refuses with the same causes and remedies, and
`list`, `show` and `plan` print them. Blockers of assignment that do not prevent binding are warnings of `bind`.

Words in capitals stand for values. The lines under a remedy are to be typed as root. Errors that no check detects are
[at the end](#other-errors).
"""


def _shown(text: str) -> str:
    """A template with its fields in capitals."""
    return re.sub(r"\{(\w+)[^}]*\}", lambda blank: blank[1].upper().replace("_", "-"), text)


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _blocker(template: BlockerTemplate) -> list[str]:
    word = "warning" if template.warning else "failure"
    lines = [f"### `{template.kind}` ({word})", ""]
    lines += [*_wrap(f"Cause: {_shown(template.cause)}."), "", *_wrap(f"Remedy: {_shown(template.remedy)}."), ""]
    if template.commands:
        lines += ["```console", *(f"# {_shown(command)}" for command in template.commands), "```", ""]
    return lines


def _check(check: Check) -> list[str]:
    titles = {other.id: other.title for other in CATALOGUE}
    lines = [f"## {check.title}", ""]
    about = f"Check `{check.id}`. Looks at: {check.looks_at}."
    if check.needs:
        about += f" Needs: {', '.join(titles[need] for need in check.needs)}."
    lines += [*_wrap(about), ""]
    for template in check.templates:
        lines += _blocker(template)
    return lines


def _other_errors() -> list[str]:
    """A table of the exceptions, and one for each package of the messages that have a hint."""
    lines = ["## Other errors", "", "A message says what failed, on what and why; the hint says what to do.", ""]
    lines += ["| exception | |", "|---|---|"]
    lines += [f"| `{error.__name__}` | {_first_line(error)} |" for error in error_classes()]
    hinted = sorted({error for error in raised() if error.remedy})
    for package, errors in groupby(hinted, lambda error: error.package):
        lines += ["", f"### {package}", "", "| message | hint |", "|---|---|"]
        lines += [f"| {_cell(error.message) or '(any)'} | {_cell(error.remedy)} |" for error in errors]
    return lines


def _first_line(error: type[Exception]) -> str:
    return (error.__doc__ or "").partition("\n")[0].replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def document() -> str:
    """The whole file."""
    lines = [INTRODUCTION]
    for check in CATALOGUE:
        lines += _check(check)
    lines += _other_errors()
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(document())
