#!/usr/bin/env python3
"""Writes docs/troubleshooting.md from the catalogue of ``kvmpass doctor``."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from kvmpass.host import BlockerTemplate
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


def document() -> str:
    """The whole file."""
    lines = [INTRODUCTION]
    for check in CATALOGUE:
        lines += _check(check)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(document())
