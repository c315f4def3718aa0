"""The guest's console on this terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from kvmpass._signals import deferred

ESCAPE = b"\x1d"  # Ctrl-], as in telnet and virsh
ESCAPE_NAME = "Ctrl-]"
END_OF_INPUT = b"\x04"  # Ctrl-D
_END_SECONDS = 1.0
_BACKLOG = 1 << 16
_PIPE = 1 << 16  # capacity of a pipe in bytes


@contextmanager
def raw_terminal(
    on_input: Callable[[bytes], int],
    on_escape: Callable[[], object],
    on_size: Callable[[int, int], object] = lambda rows, columns: None,
    escape: bytes = ESCAPE,
) -> Iterator[None]:
    """Pass every key, including Ctrl-C, to ``on_input`` until the escape; restore the terminal afterwards.

    ``escape``: that key; empty: there is none.

    ``on_input`` returns how many bytes the guest has not read yet. ``on_size`` gets rows and columns of the terminal,
    at the start and at each change (in the main thread only).

    If standard input is not a terminal, it is passed on as fast as the guest reads it. At its end Ctrl-D is typed
    once a second, because a program that runs in the shell may read one.

    Synchronization: all three callbacks run in the thread ``keyboard``.
    """
    import termios
    import tty

    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd) if os.isatty(fd) else None
    done, wake = os.pipe()
    resized, resize = os.pipe()

    def read() -> None:
        on_size(*terminal_size())
        while True:
            ready, _, _ = select.select([fd, done, resized], [], [])
            if done in ready:
                return
            if resized in ready:
                os.read(resized, _PIPE)
                on_size(*terminal_size())
                continue
            try:
                data = os.read(fd, 4096)
            except OSError:  # the terminal has gone
                return
            if not data:
                while saved is None and not select.select([done], [], [], _END_SECONDS)[0]:
                    on_input(END_OF_INPUT)
                return
            before, escaped, _ = data.partition(escape) if saved and escape else (data, b"", b"")
            waiting = on_input(before) if before else 0
            while waiting > _BACKLOG and not select.select([done], [], [], 0.1)[0]:
                waiting = on_input(b"")
            if escaped:
                on_escape()
                return

    thread = threading.Thread(target=read, name="keyboard", daemon=True)
    try:
        if saved is not None:
            tty.setraw(fd)
        with _on_resize(resize) if saved is not None else nullcontext():
            thread.start()
            yield
    finally:
        if saved is not None:
            with deferred(), suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(fd, termios.TCSADRAIN, saved)
        if thread.ident is not None:  # started
            os.write(wake, b".")
            thread.join()
        for end in (done, wake, resized, resize):
            os.close(end)


@contextmanager
def _on_resize(pipe: int) -> Iterator[None]:
    """Write a byte to ``pipe`` for each SIGWINCH, unless the pipe is full. Only the main thread handles signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        with suppress(BlockingIOError):
            os.write(pipe, b".")

    os.set_blocking(pipe, False)
    before = signal.signal(signal.SIGWINCH, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL if before is None else before)


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the terminal on standard output; 24 and 80 if there is none, or its size is unknown."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 24, 80
    return size.lines or 24, size.columns or 80
