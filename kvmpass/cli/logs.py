"""``kvmpass logs``."""

from __future__ import annotations

import contextlib
import os
import time

import click

from kvmpass.cli.guests import GUEST
from kvmpass.cli.output import write_all
from kvmpass.session.directory import CONSOLE, OLDER_CONSOLE, find, is_dead

_PAUSE = 0.2
_CHUNK = 1 << 16


@click.command()
@click.argument("guest", type=GUEST)
@click.option("-f", "--follow", is_flag=True, help="Go on until the guest ends.")
def logs(guest: str, follow: bool) -> None:
    """Print what the console of GUEST has printed since its start.

    Of a console that has printed more, the latest 8 to 16 MiB are kept.
    """
    path = find(guest)
    with contextlib.suppress(FileNotFoundError), (path / OLDER_CONSOLE).open("rb") as older:
        while data := older.read(_CHUNK):
            write_all(1, data)
    file = (path / CONSOLE).open("rb")
    try:
        while True:
            ended = not path.exists() or is_dead(path)  # before the last read
            while data := file.read(_CHUNK):
                write_all(1, data)
            if not follow or ended:
                return
            with contextlib.suppress(FileNotFoundError):
                if not os.path.samestat(os.fstat(file.fileno()), (path / CONSOLE).stat()):
                    newer = (path / CONSOLE).open("rb")
                    write_all(1, file.read())  # what was written since
                    file.close()
                    file = newer
                    continue
            time.sleep(_PAUSE)
    finally:
        file.close()
