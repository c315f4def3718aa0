"""``--console-log``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpass.guest import Sink


class ConsoleLog:
    """``--console-log``: the whole console in a file, which the constructor opens. Raises ``OSError``.

    A later write error is reported once and does not end the guest.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            self._file = path.open("wb", buffering=0) if path else None
        except OSError as error:
            error.add_note("name a file with --console-log that this user may write")
            raise

    def beside(self, sink: Sink | None) -> Sink | None:
        """Return a sink that writes here, and to ``sink``."""
        if self._file is None:
            return sink

        def write(data: bytes) -> None:
            self._write(data)
            if sink is not None:
                sink(data)

        return write

    def _write(self, data: bytes) -> None:
        try:
            while self._file is not None and data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            self.close()
            with suppress(OSError):  # standard error is full, too, or closed
                click.echo(f"kvmpass: --console-log: {self._path}: {error.strerror}: the rest is missing", err=True)

    def close(self) -> None:
        """Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
