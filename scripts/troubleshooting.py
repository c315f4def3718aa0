#!/usr/bin/env python3
"""Writes docs/troubleshooting.md from the catalogue of ``kvmpass doctor``."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from kvmpass.host import Problem
from kvmpass.host.doctor import CATALOGUE, Check

FILE = Path(__file__).parents[1] / "docs/troubleshooting.md"
INTRODUCTION = """\
<!-- Made by scripts/troubleshooting.py from kvmpass/host/doctor and kvmpass/host/blockers: change it there. -->

# Troubleshooting

`kvmpass doctor` makes the checks below; with a PCI address (`kvmpass doctor 0000:01:00.0`) those of the device, too.
Nothing is changed. Run it as root: it sees more then. What fails keeps a device from being assigned; warnings do not.
What depends on a check that failed is skipped: cure the cause, then ask again. `kvmpass assign` refuses with the same
words what makes the host, the memory or a device unfit. `kvmpass list` and `show` judge a device by the same list;
what of it keeps a device from being assigned, not from being bound, is a warning of `bind`.

Words in capitals stand for what is found on a host. Lines under a remedy are to be typed as root.
"""


def _shown(template: str) -> str:
    """A template with its blanks in capitals."""
    return re.sub(r"\{(\w+)[^}]*\}", lambda blank: blank[1].upper().replace("_", "-"), template)


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _problem(problem: Problem) -> list[str]:
    word = "warning" if problem.warning else "failure"
    lines = [f"### `{problem.kind}` ({word})", ""]
    lines += [*_wrap(f"Cause: {_shown(problem.cause)}."), "", *_wrap(f"Remedy: {_shown(problem.remedy)}."), ""]
    if problem.commands:
        lines += ["```console", *(f"# {_shown(command)}" for command in problem.commands), "```", ""]
    return lines


def _check(check: Check) -> list[str]:
    titles = {one.id: one.title for one in CATALOGUE}
    lines = [f"## {check.title}", ""]
    about = f"Check `{check.id}`. Looks at: {check.looks_at}."
    if check.needs:
        about += f" Needs: {', '.join(titles[need] for need in check.needs)}."
    lines += [*_wrap(about), ""]
    for problem in check.problems:
        lines += _problem(problem)
    return lines


def document() -> str:
    """The whole file."""
    lines = [INTRODUCTION]
    for check in CATALOGUE:
        lines += _check(check)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(document())
