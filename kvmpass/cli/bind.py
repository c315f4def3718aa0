"""``kvmpass bind`` and ``kvmpass unbind``."""

from __future__ import annotations

from typing import Any

import click

from kvmpass import host
from kvmpass.cli.output import Output, host_command, together
from kvmpass.cli.params import BDF
from kvmpass.host.drivers.bind import Handover
from kvmpass.host.drivers.changes import MATCHING

_options = together(
    click.argument("bdfs", metavar="BDF...", nargs=-1, required=True, type=BDF),
    click.option("--group", is_flag=True, help="All devices of these IOMMU groups, except bridges."),
    click.option("-n", "--dry-run", is_flag=True, help="Print each step and change nothing."),
)


@click.command()
@_options
@click.option("--force", is_flag=True, help="Also devices that the host uses, or with a driverctl override.")
@host_command
def bind(output: Output, bdfs: tuple[host.Bdf, ...], **options: Any) -> None:
    """Bind devices to vfio-pci, until unbind or reboot.

    \b
      kvmpass bind 0000:01:00.0               one function
      kvmpass bind --group 0000:01:00.0       with its whole IOMMU group
      kvmpass bind --dry-run 0000:01:00.0     each step, and nothing is changed

    For a device that is assigned repeatedly: kvmpass assign uses a bound device and leaves it bound. For a single run
    this is not needed, because assign binds and rebinds devices itself. Either all of the devices are bound, or none.
    A device that is already bound to vfio-pci stays so.

    Without --force, bind refuses devices that the host uses (a mounted drive, swap, the default route, a port of a
    bridge, a connection, an open device node, the console, the display), and devices whose use it cannot detect
    (members of a RAID that is shown elsewhere). Always refused are bridges, devices without an IOMMU group, devices
    that a process has open through VFIO or that kvmpass assign uses, and a 9p or virtio-fs that is mounted.

    The previous driver is recorded in /var/lib/kvmpass, or $KVMPASS_STATE_DIR. If bind is ended by SIGKILL, kvmpass
    restore rebinds it. Needs root.
    """
    _print(output, options["dry_run"], host.bind(bdfs, say=output.note, **options))


@click.command()
@_options
@click.option("--force", is_flag=True, help="Also devices that driverctl binds to vfio-pci.")
@host_command
def unbind(output: Output, bdfs: tuple[host.Bdf, ...], **options: Any) -> None:
    """Unbind devices from vfio-pci and rebind them to their drivers.

    \b
      kvmpass unbind 0000:01:00.0             to the driver that it had before kvmpass bind
      kvmpass unbind --group 0000:01:00.0     with its whole IOMMU group
      kvmpass unbind --dry-run 0000:01:00.0   each step, and nothing is changed

    For a device that was not bound by kvmpass, the kernel chooses the driver. Either all of the devices are rebound,
    or none. A device that is not bound to vfio-pci is not changed.

    A device that a process has open through VFIO is always refused: the kernel would wait for that process. Needs
    root.
    """
    _print(output, options["dry_run"], host.unbind(bdfs, say=output.note, **options))


def _print(output: Output, dry_run: bool, results: list[Handover]) -> None:
    devices = [
        {
            "bdf": result.bdf,
            "outcome": result.outcome,
            "driver_before": result.before,
            "driver_after": result.after,
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
        return f"a bridge, not changed ({before})"
    if result.outcome == "already":
        return f"already on {before}" if result.before else "already without a driver"
    after = "the matching driver" if result.after == MATCHING else result.after or "no driver"
    return f"{before} -> {after}"
