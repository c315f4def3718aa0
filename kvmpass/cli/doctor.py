"""``kvmpass doctor``."""

from __future__ import annotations

import click

from kvmpass import host
from kvmpass.cli.findings import document, show
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import BDF, SIZE
from kvmpass.host import Finding, Outcome
from kvmpass.layout import parse_size


@click.command()
@click.argument("bdf", required=False, type=BDF)
@click.option(
    "--memory", default="1G", show_default=True, type=SIZE, help="The guest's memory: a number with K, M, G or T."
)
@click.option("--hugepages", type=click.Choice(["2M", "1G"]), help="It must come from the host's pool of such pages.")
@host_command
def doctor(output: Output, bdf: host.Bdf | None, memory: int, hugepages: str | None) -> int:
    """Check everything that an assignment needs, from the firmware to the permissions of files.

    With BDF, a PCI address, that device too: its group, who uses it, its reset, its memory. Nothing is changed and no
    module is loaded. What is not as it should be is shown with what was read, the cause and the remedy; with -v what
    was read for everything. What depends on an earlier failure is skipped: cure the cause, then ask again.

    The checks are those by which kvmpass assign refuses, and more. As root it sees more. Exit status: 0 if nothing
    fails (warnings are none), else 1.
    """
    page = parse_size(hugepages) if hugepages else 0
    findings = host.diagnose(host.Sysfs(), bdf, memory=memory, huge_page=page)
    failed = [finding for finding in findings if finding.outcome is Outcome.FAIL]
    output.document(
        bdf=None if bdf is None else str(bdf),
        memory=memory,
        huge_page=page or None,
        ok=not failed,
        findings=[document(finding) for finding in findings],
    )
    show(output, findings, {check.id: check.title for check in host.CATALOGUE}, details=output.verbose)
    output.text()
    output.text(conclusion(findings))
    return 1 if failed else 0


def conclusion(findings: list[Finding]) -> str:
    """One line for all."""
    counts = {outcome: sum(one.outcome is outcome for one in findings) for outcome in Outcome}
    failed = counts[Outcome.FAIL]
    parts = [f"{failed} check{'s' if failed != 1 else ''} failed" if failed else "nothing failed"]
    if counts[Outcome.WARN]:
        parts.append(f"{counts[Outcome.WARN]} warning{'s' if counts[Outcome.WARN] != 1 else ''}")
    if counts[Outcome.SKIPPED]:
        parts.append(f"{counts[Outcome.SKIPPED]} skipped")
    return f"{', '.join(parts)}, {counts[Outcome.PASS]} passed"
