"""``kvmpass start``."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from kvmpass._garbage import collect_as_usual
from kvmpass.cli.console_log import ConsoleLog
from kvmpass.cli.copied import report
from kvmpass.cli.ending import exit_status
from kvmpass.cli.guest_options import (
    guest_options,
    guest_spec,
    machine_options,
    run_options,
    stay_options,
    wrong_usage,
)
from kvmpass.cli.output import error_text
from kvmpass.cli.params import BDF
from kvmpass.guest import GuestResult
from kvmpass.host import Bdf
from kvmpass.session.background import in_background
from kvmpass.session.directory import check_name
from kvmpass.session.session import BOOT_SECONDS
from kvmpass.session.stay import stay

# A message has a limit, and the guest has a part in what they say: its failures must not hide missing files.
_MAX_WARNING = 300  # characters of a line
_FAILURES = 8, 8 << 10  # lines, and their bytes in the message
_FILES = 56, 24 << 10


@click.command()
@click.argument("bdf", nargs=-1, type=BDF)
@stay_options
@machine_options
@guest_options
@run_options
@click.option("-v", "--verbose", is_flag=True, help="Print each step; show the kernel's messages on the console.")
@click.pass_obj
def start(command: list[str] | None, /, bdf: tuple[Bdf, ...], **options: Any) -> int:
    """Boot a Linux guest that stays, and assign the PCI devices BDF to it.

    Returns once the guest runs commands; its name is printed. Then kvmpass exec runs commands in it, any number at
    once, cp copies files, console attaches to its console, logs prints that, ps shows it, stop ends it. Its name, or
    the address of one of its devices, stands for it.

    The guest is a process of this user's, found through a directory that only this user may open: in /run/kvmpass for
    root, else in $XDG_RUNTIME_DIR/kvmpass. When it ends, for any reason, its devices are rebound to their drivers
    (after a SIGKILL: kvmpass restore). Needs what kvmpass assign needs.
    """
    if not bdf and options["name"] is None:
        raise click.UsageError("name a BDF, or give a guest without devices a --name")
    return start_guest(command, bdf, **options)


def start_guest(
    command: list[str] | None,
    devices: tuple[Bdf, ...],
    *,
    name: str | None,
    boot_timeout: float | None,
    timeout: float | None,
    console_log: Path | None,
    memory: str,
    cpus: int,
    backing: str,
    backend: str,
    p2p: bool,
    vf_token: uuid.UUID | None,
    verbose: bool,
    **guest: Any,
) -> int:
    """Start a guest in the background, print its name, and return 0; else the status of its process.

    The arguments are the options of ``kvmpass start``. A ``command`` is refused: a guest whose end takes its log and
    its status with it would leave nothing of it. Raises ``click.UsageError``, ``KvmpassError``.
    """
    name = str(devices[0]) if name is None else name
    if command is not None:
        raise wrong_usage(
            "a guest that stays has no COMMAND of its own",
            f"run it once the guest has started: kvmpass exec {name} -- COMMAND",
        )
    spec = guest_spec(None, **guest, verbose=verbose, session=True)
    check_name(name)

    def run(ready: Callable[[Path], None]) -> int:
        def running(directory: Path) -> None:
            collect_as_usual()
            ready(directory)

        with closing(ConsoleLog(console_log)) as log:
            result = stay(
                name,
                devices,
                spec,
                running,
                _answer,
                log=log.beside(None),
                reason=error_text,
                say=_say if spec.verbose else None,
                warn=lambda line: click.echo(f"kvmpass: warning: {line}", err=True),
                boot_timeout=BOOT_SECONDS if boot_timeout is None else boot_timeout,
                timeout=timeout,
                memory=memory,
                cpus=cpus,
                backing=backing,
                backend=backend,
                p2p=p2p,
                vf_token=vf_token,
            )
        return exit_status(result, command=False)

    status = in_background(run)
    if status == 0:
        click.echo(name)
    return status


def _say(line: str) -> None:
    click.echo(f"kvmpass: {line}", err=True)


def _answer(result: GuestResult) -> dict[str, Any]:
    """Return what those who wait for the end are told."""
    return {
        "status": exit_status(result, command=False),
        "outcome": f"the guest {result.outcome.value}",
        "warnings": [
            *_limited((f"warning: error in the guest: {failure}" for failure in result.failures), *_FAILURES),
            *_limited(report(result.copied_out, verbose=False), *_FILES),
        ],
    }


def _limited(lines: Iterable[str], count: int, limit: int) -> list[str]:
    """Return the first ``count`` of ``lines``, ``limit`` bytes of a message at most, and whether there is more."""
    kept: list[str] = []
    size = 0
    for line in lines:
        shown = line if len(line) <= _MAX_WARNING else f"{line[:_MAX_WARNING]}…"
        size += len(json.dumps(shown))
        if len(kept) == count or size > limit:
            return [*kept, "warning: and more"]
        kept.append(shown)
    return kept
