"""``kvmpass bind`` and ``kvmpass unbind``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kvmpass import host
from kvmpass.cli.output import Output, host_command
from kvmpass.cli.params import BDF
from kvmpass.host.drivers.bind import Handover
from kvmpass.host.drivers.changes import MATCHING


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (
        click.option("-n", "--dry-run", is_flag=True, help="Say each step and change nothing."),
        click.option("--group", is_flag=True, help="All devices of their IOMMU groups, bridges excluded."),
        click.argument("bdfs", metavar="BDF...", nargs=-1, required=True, type=BDF),
    ):
        function = decorate(function)
    return function


@click.command()
@_options
@click.option("--force", is_flag=True, help="Also what the host uses, or driverctl keeps elsewhere.")
@host_command
def bind(output: Output, bdfs: tuple[host.Bdf, ...], **options: Any) -> None:
    """Hand devices over to vfio-pci, until unbind or reboot.

    \b
      kvmpass bind 0000:01:00.0               one function
      kvmpass bind --group 0000:01:00.0       with its whole IOMMU group
      kvmpass bind --dry-run 0000:01:00.0     each step, and nothing is changed

    For a device that a guest is to have again and again: kvmpass assign uses a bound device as it is and leaves it
    bound. (A device that is not bound need not be: assign does that, and undoes it.) All of the devices are bound, or
    none. A device that is on vfio-pci already is left there.

    Refused is what the host uses (a mounted drive, swap, the default route, a bridge's port, a connection, an open
    node, the console, the display), and what it may use unseen (members of a RAID that is shown elsewhere). --force
    takes it all the same. Refused for good are bridges, devices without an IOMMU group, devices that a process has
    open through VFIO or kvmpass assign has, and a 9p or virtio-fs that is mounted.

    What was there is remembered (in /var/lib/kvmpass, or $KVMPASS_STATE_DIR). After a SIGKILL on the way kvmpass
    restore brings it back. Needs root.
    """
    _print(output, options["dry_run"], host.bind(bdfs, say=output.note, **options))


@click.command()
@_options
@click.option("--force", is_flag=True, help="Also what driverctl keeps on vfio-pci.")
@host_command
def unbind(output: Output, bdfs: tuple[host.Bdf, ...], **options: Any) -> None:
    """Give devices back from vfio-pci to their drivers.

    \b
      kvmpass unbind 0000:01:00.0             to the driver that kvmpass bind found
      kvmpass unbind --group 0000:01:00.0     with its whole IOMMU group
      kvmpass unbind --dry-run 0000:01:00.0   each step, and nothing is changed

    A device that somebody else has bound goes to the driver that the kernel finds for it. All of the devices are
    given back, or none. A device that is not on vfio-pci is left where it is.

    Refused, for good, is a device that a process has open through VFIO: the kernel would wait for that process.
    Needs root.
    """
    _print(output, options["dry_run"], host.unbind(bdfs, say=output.note, **options))


def _print(output: Output, dry_run: bool, results: list[Handover]) -> None:
    devices = [
        {
            "bdf": str(result.bdf),
            "outcome": result.outcome,
            "from": result.before,
            "to": result.after,
            "steps": result.steps,
            "warnings": result.warnings,
        }
        for result in results
    ]
    output.document(dry_run=dry_run, devices=devices)
    for result in results:
        output.text(f"{result.bdf}  {_describe(result)}")
        for step in result.steps:
            if dry_run:
                output.text(f"  {step}")
            elif output.verbose:
                output.note(step)
        for warning in result.warnings:
            output.note(f"warning: {warning}")
    if dry_run:
        output.note("dry run: nothing was changed")


def _describe(result: Handover) -> str:
    before = result.before or "no driver"
    if result.outcome == "excluded":
        return f"a bridge, left alone ({before})"
    if result.outcome == "already":
        return f"already on {before}" if result.before else "already without a driver"
    after = "the driver that matches" if result.after == MATCHING else result.after or "no driver"
    return f"{before} -> {after}"
