"""Standard input for a command in the guest."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpass.guest.input import Input

_CHUNK = 1 << 16
_BACKLOG = 1 << 18  # bytes that the command has not read


@contextmanager
def passed_input(input: Input) -> Iterator[None]:
    """Send standard input to ``input`` until its end, as fast as the guest reads, in a thread of its own."""
    fd = sys.stdin.fileno()
    done, wake = os.pipe()

    def read() -> None:
        while done not in select.select([fd, done], [], [])[0]:
            try:
                data = os.read(fd, _CHUNK)
            except OSError:  # the terminal has gone
                data = b""
            if not data:
                input.end()
                return
            input.send(data)
            while not input.wait_below(_BACKLOG, 0.1):
                if select.select([done], [], [], 0)[0]:
                    return

    thread = threading.Thread(target=read, name="input", daemon=True)
    try:
        thread.start()
        yield
    finally:
        os.write(wake, b".")
        thread.join()
        for end in (done, wake):
            os.close(end)
