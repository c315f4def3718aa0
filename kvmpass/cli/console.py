"""``kvmpass console``."""

from __future__ import annotations

import contextlib
import sys

import click

from kvmpass.cli.guests import GUEST
from kvmpass.cli.input import PipedInput
from kvmpass.cli.terminal import ESCAPE_NAME, raw_terminal
from kvmpass.session.client import Client


@click.command()
@click.argument("guest", type=GUEST)
def console(guest: str) -> None:
    """Attach this terminal to the console of GUEST.

    Every key goes to the guest, in which a shell runs on the console; Ctrl-] detaches, and the guest runs on. Several
    terminals can be attached. kvmpass logs shows what the console has printed before.
    """
    if not sys.stdin.isatty():
        raise click.UsageError("standard input is not a terminal: kvmpass logs -f shows the console")
    with Client.connect(guest) as client, contextlib.closing(PipedInput()) as piped:
        client.request("console", [piped.source, 1])
        piped.sent()
        with raw_terminal(piped.send, client.leave, lambda rows, columns: client.notify(size=[rows, columns])):
            # In raw mode: what is typed before that is lost.
            click.echo(f"kvmpass: {ESCAPE_NAME} detaches from {client.guest}\r", err=True)
            client.answer()
    click.echo(f"\r\nkvmpass: detached from {client.guest}", err=True)
