"""``kvmpass start``."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from kvmpass.cli.console_log import ConsoleLog
from kvmpass.cli.guest_options import guest_options, guest_spec, machine_options
from kvmpass.cli.main import GUEST_SILENT
from kvmpass.cli.output import error_text
from kvmpass.cli.params import BDF
from kvmpass.guest import GuestResult, GuestSpec
from kvmpass.host import Bdf
from kvmpass.machine import GuestOutcome
from kvmpass.memory import Backing
from kvmpass.session.background import in_background
from kvmpass.session.directory import check_name
from kvmpass.session.stay import stay

CRASHED = (GuestOutcome.PANIC, GuestOutcome.TRIPLE_FAULT, GuestOutcome.FAULT, GuestOutcome.DEVICE_ERROR)
"""Outcomes of a guest without a command that are failures."""


@click.command()
@click.argument("bdf", nargs=-1, type=BDF)
@click.option("--name", help="Name of the guest.  [default: the address of its first device]")
@machine_options
@guest_options
@click.option(
    "--boot-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up if the guest does not run commands after this time.",
)
@click.option("--console-log", type=click.Path(path_type=Path), help="Write the whole console to this file, too.")
@click.option("-v", "--verbose", is_flag=True, help="Print each step; show the kernel's messages on the console.")
def start(
    bdf: tuple[Bdf, ...],
    name: str | None,
    memory: str,
    cpus: int,
    hugepages: str | None,
    backend: str,
    p2p: bool,
    vf_token: uuid.UUID | None,
    boot_timeout: float,
    console_log: Path | None,
    verbose: bool,
    **guest: Any,
) -> int:
    """Boot a Linux guest that stays, and assign the PCI devices BDF to it.

    Returns once the guest runs commands; its name is printed. Then kvmpass exec runs commands in it, any number at
    once, cp copies files, console attaches to its console, logs prints that, ps shows it, stop ends it. Its name, or
    the address of one of its devices, stands for it.

    The guest is a process of this user's, found through a directory that only this user may open: in /run/kvmpass for
    root, else in $XDG_RUNTIME_DIR/kvmpass. When it ends, for any reason, its devices are rebound to their drivers
    (after a SIGKILL: kvmpass restore). Needs what kvmpass assign needs.
    """
    if not bdf and name is None:
        raise click.UsageError("name a BDF, or give a guest without devices a --name")
    spec = guest_spec(None, **guest, verbose=verbose, session=True)
    return start_guest(
        name or str(bdf[0]),
        bdf,
        spec,
        console_log,
        boot_timeout=boot_timeout,
        memory=memory,
        cpus=cpus,
        backing=Backing(f"hugetlb-{hugepages}") if hugepages else Backing.ANONYMOUS,
        backend=backend,
        p2p=p2p,
        vf_token=vf_token,
    )


def start_guest(
    name: str, devices: tuple[Bdf, ...], spec: GuestSpec, console_log: Path | None, **options: Any
) -> int:
    """Start a guest in the background, print its name, and return 0; else the status of its process."""
    check_name(name)

    def run(ready: Callable[[Path], None]) -> int:
        with closing(ConsoleLog(console_log)) as log:
            result = stay(
                name,
                devices,
                spec,
                ready,
                _answer,
                log=log.beside(None),
                reason=error_text,
                say=_say if spec.verbose else lambda line: None,
                warn=lambda line: click.echo(f"kvmpass: warning: {line}", err=True),
                **options,
            )
        return _status(result)

    status = in_background(run)
    if status == 0:
        click.echo(name)
    return status or 0


def _say(line: str) -> None:
    click.echo(f"kvmpass: {line}", err=True)


def _status(result: GuestResult) -> int:
    return GUEST_SILENT if result.outcome in CRASHED else 0


def _answer(result: GuestResult) -> dict[str, Any]:
    """Return what those who wait for the end are told."""
    return {"status": _status(result), "outcome": f"the guest {result.outcome.value}"}
