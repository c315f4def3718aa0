"""The guest's console on this terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ESCAPE = b"\x1d"  # Ctrl-], as telnet and virsh have it
ESCAPE_NAME = "Ctrl-]"


@contextmanager
def raw_terminal(on_input: Callable[[bytes], object], on_escape: Callable[[], object]) -> Iterator[None]:
    """Every key goes to ``on_input``, Ctrl-C too, until the escape; the terminal is restored afterwards.

    Where standard input is no terminal it is passed on as it comes, until its end.
    """
    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd) if os.isatty(fd) else None
    done, wake = os.pipe()

    def read() -> None:
        while True:
            ready, _, _ = select.select([fd, done], [], [])
            if done in ready:
                return
            data = os.read(fd, 4096)
            if not data:
                return
            before, escape, _ = data.partition(ESCAPE) if saved else (data, b"", b"")
            if before:
                on_input(before)
            if escape:
                on_escape()
                return

    thread = threading.Thread(target=read, name="keyboard", daemon=True)
    if saved is not None:
        tty.setraw(fd)
    try:
        thread.start()
        yield
    finally:
        os.write(wake, b".")
        thread.join()
        os.close(done)
        os.close(wake)
        if saved is not None:
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the terminal on standard output; 24 and 80 where there is none."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 24, 80
    return size.lines, size.columns
