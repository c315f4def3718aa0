"""``kvmpass stop`` and ``kvmpass wait``."""

from __future__ import annotations

from typing import Any

import click

from kvmpass.cli.guests import GUEST
from kvmpass.cli.main import ASSIGN_FAILED, FAILED
from kvmpass.cli.output import error_text, remedies
from kvmpass.errors import KvmpassError
from kvmpass.session.client import Client
from kvmpass.session.directory import guests


@click.command()
@click.argument("guest", nargs=-1, type=GUEST)
@click.option("--all", "everything", is_flag=True, help="Stop all guests of this user.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, max=3600),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Let a guest power off for so long, up to 10 seconds more while files of --copy-out come, then end it.",
)
def stop(guest: tuple[str, ...], everything: bool, timeout: float) -> int:
    """Let each GUEST power off, and rebind its devices to their drivers.

    Returns once that is done, and files of --copy-out are here. The exit status is 1 if a guest does not run, its
    devices could not be rebound, or files are missing.
    """
    if everything == bool(guest):
        raise click.UsageError("name each GUEST, or use --all")
    names = [status.name for status in guests() if status.state != "dead"] if everything else list(guest)
    failed = False
    for name in names:
        try:
            with Client.connect(name) as client:
                client.request("stop", timeout=timeout)
                failed |= _ended(client.answer()) == ASSIGN_FAILED
        except KvmpassError as error:
            failed = True
            click.echo(f"kvmpass: {name}: {error_text(error)}", err=True)
            for remedy in remedies(error):
                click.echo(f"  hint: {remedy}", err=True)
    return FAILED if failed else 0


@click.command()
@click.argument("guest", type=GUEST)
def wait(guest: str) -> int:
    """Wait until GUEST has ended and its devices are rebound.

    The exit status is that of kvmpass assign: 0 if it powered off, rebooted or was stopped, 126 if it crashed, 124 if
    --timeout expired; 125 if kvmpass failed, or files of --copy-out are missing.
    """
    with Client.connect(guest) as client:
        client.request("wait")
        answer = client.answer()
    click.echo(f"kvmpass: {client.guest}: {answer.get('outcome')}", err=True)
    return _ended(answer)


def _ended(answer: dict[str, Any]) -> int:
    """Print the warnings of a guest's end; return the exit status of ``wait``."""
    for line in answer.get("warnings", ()):
        click.echo(f"kvmpass: {line}", err=True)
    return int(answer.get("status", 0))
