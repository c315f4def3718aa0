"""``kvmpass exec``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from types import FrameType

import click

from kvmpass.cli.guests import GUEST
from kvmpass.cli.input import PipedInput, passed_input
from kvmpass.cli.main import TIME_UP
from kvmpass.cli.terminal import raw_terminal, terminal_size
from kvmpass.cli.variables import variables
from kvmpass.session.client import Client

_PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE = 3  # of these signals end kvmpass itself


@click.command("exec")
@click.argument("guest", type=GUEST)
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input to COMMAND.")
@click.option("-t", "--tty", is_flag=True, help="Give COMMAND a terminal; standard input must be one.")
@click.option(
    "-e",
    "--env",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Set a variable for COMMAND, or pass on this one's.  [repeatable]",
)
@click.option("-w", "--workdir", metavar="DIR", help="Start COMMAND in this directory of the guest.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Kill COMMAND after this time; exit status 124.",
)
@click.pass_obj
def exec_(
    command: list[str] | None,
    /,
    guest: str,
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str | None,
    timeout: float | None,
) -> int:
    """Run COMMAND in a guest that kvmpass start has started.

    \b
    kvmpass exec [OPTIONS] GUEST -- COMMAND...

    GUEST is its name, or the address of one of its devices. COMMAND has this command's standard output and error, and
    an empty input unless -i passes this one's. Signals (INT, TERM, HUP, QUIT, USR1, USR2) go to COMMAND; the third
    one ends this command. When this command ends, COMMAND is killed.

    With -t COMMAND gets a terminal, which follows changes of this one's size: every key goes to it, Ctrl-C included,
    and its errors are part of its output. Its TERM is this one's, unless -e sets it.

    \b
    Exit status: that of COMMAND, or:
      124    --timeout expired
      125    kvmpass failed, or no such guest runs
      126    the guest ended
      127    COMMAND could not be run: not found, for example
      128+N  COMMAND was ended by signal N
    """
    if not command:
        raise click.UsageError("missing COMMAND after --")
    if tty and not sys.stdin.isatty():
        raise click.UsageError("-t passes a terminal on: standard input is none")
    environment = dict(text.split("=", 1) for text in variables(["TERM", *env] if tty else env))
    with ExitStack() as undo:
        client = undo.enter_context(Client.connect(guest))
        # A signal that comes before there are handlers is for COMMAND, too. Threads inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)
        undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        streams: list[int] = [1, 2]
        passing: AbstractContextManager[object] = nullcontext()
        piped: PipedInput | None = None
        if tty or (interactive and sys.stdin.isatty()):
            piped = undo.enter_context(closing(PipedInput()))
            streams.insert(0, piped.source)
            passing = (
                raw_terminal(piped.send, _nothing, lambda rows, columns: client.notify(size=[rows, columns]), b"")
                if tty
                else passed_input(piped)
            )
        elif interactive:
            streams.insert(0, 0)
        client.request(
            "exec",
            streams,
            args=command,
            env=environment,
            cwd=workdir,
            size=terminal_size() if tty else None,
        )
        if piped is not None:
            piped.sent()
        with _signals_passed(client), passing:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            try:
                status = int(client.answer(timeout)["status"])
            except TimeoutError:
                click.echo(f"kvmpass: COMMAND was killed after {timeout:g} seconds", err=True)
                return TIME_UP
    return status if status >= 0 else 128 - status


def _nothing() -> None:
    """Do nothing at an escape: there is none."""


@contextmanager
def _signals_passed(client: Client) -> Iterator[None]:
    """Send signals to the command in the guest, unless they are ignored."""
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        if received >= _PATIENCE:
            raise SystemExit(128 + number)
        client.notify(signal=number)

    with ExitStack() as undo:
        for number in _PASSED:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                signal.signal(number, handle)
                undo.callback(partial(signal.signal, number, signal.SIG_DFL if before is None else before))
        yield


exec = exec_
