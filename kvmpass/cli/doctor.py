"""``kvmpass doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from kvmpass import host
from kvmpass.cli import tables
from kvmpass.cli.findings import document, show
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import BDF, SIZE
from kvmpass.cli.tree import tree_option
from kvmpass.host.doctor import Finding, Outcome
from kvmpass.host.record import Anonymity, Recorder, record
from kvmpass.layout import parse_size


@click.command()
@click.argument("bdf", required=False, type=BDF)
@click.option(
    "--memory", default="1G", show_default=True, type=SIZE, help="The guest's memory: a number with K, M, G or T."
)
@click.option(
    "--hugepages",
    type=click.Choice(["auto", "2M", "1G"]),
    help="Guest memory comes from the host's pool; auto: from that of the largest pages that has enough, if any.",
)
@click.option(
    "--record",
    "archive",
    metavar="FILE.tar",
    type=click.Path(path_type=Path),
    help="Record this host in an archive, for --sysfs.",
)
@click.option("--anonymous", is_flag=True, help="With --record: replace addresses and serial numbers.")
@host_command
@tree_option
def doctor(
    output: Output,
    bdf: host.Bdf | None,
    memory: int,
    hugepages: str | None,
    archive: Path | None,
    anonymous: bool,
    tree: host.Sysfs | None,
) -> int:
    """Check everything that an assignment needs.

    The checks go from the firmware to file permissions. With BDF, a PCI address, that device is checked, too: its
    group, its current use, its reset, its memory. doctor changes nothing and loads no module. For a check that did
    not pass it prints what was read, the cause and the remedy; with -v what was read for every check. Checks that
    depend on a failed one are skipped: fix it and run doctor again.

    The checks include all that kvmpass assign makes. Root can read more. Exit status: 0 if no check failed (warnings
    do not count), else 1.

    \b
    Examples:
      kvmpass doctor 0000:01:00.0                 this host and one of its devices
      kvmpass doctor --record host.tar.gz         record all that list, show, doctor and plan read
      kvmpass doctor --sysfs host.tar.gz          the same answers, on any machine
    """
    if archive is not None:
        return _record(output, archive, anonymous, tree)
    if anonymous:
        raise click.UsageError("--anonymous needs --record")
    sysfs = tree or host.Sysfs()
    page = 0
    if hugepages == "auto":
        from kvmpass.assignment.backing import choose_backing

        choice = choose_backing(sysfs, memory, [bdf] if bdf else [])
        output.note(f"backing {choice}")
        page = choice.backing.huge_page
    elif hugepages:
        page = parse_size(hugepages)
    findings = host.diagnose(sysfs, bdf, memory=memory, huge_page=page)
    failed = [finding for finding in findings if finding.outcome is Outcome.FAIL]
    output.document(
        bdf=bdf,
        memory=memory,
        huge_page=page or None,
        ok=not failed,
        findings=[document(finding) for finding in findings],
    )
    show(output, findings, {check.id: check.title for check in host.doctor.CATALOGUE}, details=output.verbose)
    output.text()
    output.text(conclusion(findings))
    return 1 if failed else 0


def _record(output: Output, archive: Path, anonymous: bool, tree: host.Sysfs | None) -> int:
    if tree is not None:
        raise click.UsageError("--record cannot be used with --sysfs: it records this host")
    recorder = Recorder()
    look_at_host(recorder)
    record(recorder, look_at_device)
    entries = recorder.write_tar(archive, Anonymity() if anonymous else None)
    size = archive.stat().st_size
    output.document(file=str(archive), entries=entries, size=size, anonymous=anonymous)
    output.text(f"{archive}: {entries} entries, {size} bytes")
    replaced = "are replaced" if anonymous else "are included (--anonymous replaces them)"
    output.note(f"addresses and serial numbers {replaced}; names of interfaces, mount points and processes are kept")
    output.note("check the archive before you publish it")
    return 0


def look_at_host(sysfs: host.Sysfs) -> None:
    """Read everything that the commands read of a host, whatever their options."""
    from kvmpass.assignment.plan import plan as make_plan  # imports the virtual machine: only to record

    host.inventory(sysfs)
    for page in (0, 2 << 20, 1 << 30):
        host.diagnose(sysfs, None, huge_page=page)
    make_plan([], sysfs=sysfs)


def look_at_device(sysfs: host.Sysfs, bdf: host.Bdf, look: host.Look) -> None:
    """Read everything else that the commands read of a device."""
    from kvmpass.assignment.backing import choose_backing, choose_nodes

    host.describe(sysfs, bdf, look)
    host.doctor.diagnose_device(look, bdf)
    sysfs.config(bdf)
    choose_nodes(sysfs, [bdf])
    for size in (1 << 30, 2 << 20):  # one page of each pool
        choose_backing(sysfs, size, [bdf])


def conclusion(findings: list[Finding]) -> str:
    """Return the last line: how many checks failed, warned, were skipped and passed."""
    counts = {outcome: sum(finding.outcome is outcome for finding in findings) for outcome in Outcome}
    failed = counts[Outcome.FAIL]
    parts = [f"{tables.count(failed, 'check')} failed" if failed else "nothing failed"]
    if counts[Outcome.WARN]:
        parts.append(tables.count(counts[Outcome.WARN], "warning"))
    if counts[Outcome.SKIPPED]:
        parts.append(f"{counts[Outcome.SKIPPED]} skipped")
    return f"{', '.join(parts)}, {counts[Outcome.PASS]} passed"
