"""``kvmpass ps``."""

from __future__ import annotations

import click

from kvmpass.cli.output import Output, host_command
from kvmpass.cli.tables import table
from kvmpass.session.directory import guests


@click.command()
@host_command
def ps(output: Output) -> None:
    """Show this user's guests that kvmpass start has started.

    A guest is starting, running or stopping. One that is not answering has hung: its agent has said nothing for half
    a minute, or has ended. The process of a dead one was killed: kvmpass restore removes it, and rebinds its devices.
    """
    found = guests()
    output.document(guests=found)
    if not found:
        output.text("no guests")
        return
    rows = [("NAME", "STATE", "PROCESS", "SINCE", "DEVICES")]
    rows += [(guest.name, guest.state, str(guest.pid), guest.since, " ".join(guest.devices)) for guest in found]
    for line in table(rows):
        output.text(line)
