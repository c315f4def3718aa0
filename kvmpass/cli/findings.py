"""Findings of ``doctor`` and blockers of ``plan``, as text and as JSON."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

import click

from kvmpass.cli.documents import blocker_document
from kvmpass.cli.output import Output
from kvmpass.host import Blocker
from kvmpass.host.doctor import Finding, Outcome

_LABELS = {Outcome.PASS: "pass", Outcome.WARN: "warn", Outcome.FAIL: "FAIL", Outcome.SKIPPED: "skip"}
_COLOURS = {Outcome.PASS: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red", Outcome.SKIPPED: None}
_MARGIN = 6
_WIDEST = 100


def show(output: Output, findings: Iterable[Finding], titles: dict[str, str], *, details: bool) -> None:
    """Print a line for each finding, and below it the cause and the remedy if the check did not pass.

    What was read is printed for these, and with ``details`` for all.
    """
    width = max(map(len, titles.values()))
    for finding in findings:
        colour = _COLOURS[finding.outcome]
        label = click.style(_LABELS[finding.outcome], fg=colour, dim=None if colour else True)
        summary = finding.summary if finding.needs is None else f"needs: {titles[finding.needs]}"
        output.text(f"{label}  {finding.title:<{width}}  {summary}".rstrip())
        if finding.blocker is not None or details:
            for reading in finding.read:
                paragraph(output, "read", str(reading))
        if finding.blocker is not None:
            show_blocker(output, finding.blocker)


def show_blocker(output: Output, blocker: Blocker) -> None:
    """Print the cause, the remedy, and the commands to type."""
    paragraph(output, "cause", blocker.cause)
    paragraph(output, "remedy", blocker.remedy)
    for number, line in enumerate(blocker.commands):  # whole lines, to be copied
        output.text(f"{'':{_MARGIN}}{'' if number else 'type':<8}{click.style(line, bold=True)}")


def paragraph(output: Output, label: str, text: str) -> None:
    """Print ``text`` beside ``label``, wrapped to the terminal."""
    columns = min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)
    first = f"{'':{_MARGIN}}{label:<8}"
    lines = textwrap.wrap(text, max(columns, 40), initial_indent=first, subsequent_indent=" " * len(first))
    output.text("\n".join(lines))


def document(finding: Finding) -> dict[str, Any]:
    """Return the fields of a finding, for ``--json``."""
    return {
        "check": finding.check,
        "title": finding.title,
        "bdf": finding.bdf,
        "outcome": str(finding.outcome),
        "summary": finding.summary,
        "needs": finding.needs,
        "read": finding.read,
        "blocker": finding.blocker and blocker_document(finding.blocker),
    }
