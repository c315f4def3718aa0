"""``kvmpass restore``."""

from __future__ import annotations

from dataclasses import asdict

import click

from kvmpass import host
from kvmpass.cli.output import Output, host_command


@click.command()
@host_command
def restore(output: Output) -> int:
    """Put devices back that a killed kvmpass has left.

    While a device is borrowed, bound or unbound, a journal (in /var/lib/kvmpass, or $KVMPASS_STATE_DIR) says what was
    there. A process that ends in any normal way puts the device back itself. After a SIGKILL this command does:
    original driver bound, driver_override and power settings as they were. What kvmpass bind has finished stays
    bound. One line is printed for each entry:

    \b
      restored     the device is as it was before
      stale        of an earlier boot or another device: dropped
      gone         the device is not on this host any more: dropped
      owner-alive  its process still runs: left alone
      corrupt      the entry cannot be read: put aside
      failed       the device could not be given back: run the command again

    It can be run at any time, and again. The exit status is 1 if an entry is corrupt or failed, else 0.
    """
    results = host.restore(say=output.note)
    output.document(results=[asdict(result) for result in results])
    if not results:
        output.text("nothing to restore")
    for result in results:
        output.text(f"{result.bdf}: {result.outcome}: {result.detail}")
    return 1 if any(result.outcome in ("corrupt", "failed") for result in results) else 0
