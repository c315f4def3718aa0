"""``kvmpass restore``."""

from __future__ import annotations

import click

from kvmpass import host
from kvmpass.cli.output import Output, error_text, host_command
from kvmpass.errors import KvmpassError
from kvmpass.session.directory import remove_dead


@click.command()
@host_command
def restore(output: Output) -> int:
    """Restore the drivers that a killed kvmpass changed.

    Before assign, bind or unbind changes a device, it records the driver and settings in a journal (in
    /var/lib/kvmpass, or $KVMPASS_STATE_DIR), and it restores them itself unless it is ended by SIGKILL. In that case
    this command does: driver, driver_override and power settings. A device for which kvmpass bind succeeded stays
    bound. One line is printed for each entry of the journal:

    \b
      restored     driver and settings are as before
      stale        the entry is of an earlier boot or of another device: dropped
      gone         the device is not on this host any more: dropped
      owner-alive  the process of the entry still runs: not changed
      corrupt      the entry cannot be read: renamed
      failed       the device could not be rebound: run the command again

    Guests of kvmpass start whose process was killed are removed from the directory in which they are found.

    The command is idempotent and can be run at any time. The exit status is 1 if an entry is corrupt or failed, else
    0.
    """
    results = host.restore(say=output.note)
    dead: list[str] = []
    try:
        dead = remove_dead()
    except (KvmpassError, OSError) as error:  # what was restored is printed all the same
        output.note(f"killed guests were not looked for: {error_text(error)}")
    output.document(devices=results, guests=dead)
    for name in dead:
        output.text(f"{name}: removed: the guest's process was killed")
    if not results and not dead:
        output.text("nothing to restore")
    for result in results:
        output.text(f"{result.bdf}: {result.outcome}: {result.detail}")
    return 1 if any(result.outcome in ("corrupt", "failed") for result in results) else 0
