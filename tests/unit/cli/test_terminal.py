"""The terminal of a guest's shell: its size, and standard input that is not a terminal."""

from __future__ import annotations

import os
import pty
import queue
import signal
import sys
import termios
import threading
from collections.abc import Iterator

import pytest

from kvmpass.cli import terminal


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    read, write = os.pipe()
    with os.fdopen(read) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield write


def test_the_end_of_a_pipe_ends_the_shell(pipe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All input arrives, then Ctrl-D repeatedly: a program in the shell may have read the first one."""
    monkeypatch.setattr(terminal, "_END_SECONDS", 0.01)
    typed, thrice = bytearray(), threading.Event()

    def on_input(data: bytes) -> int:
        typed.extend(data)
        if typed.count(terminal.END_OF_INPUT) >= 3:
            thrice.set()
        return 0

    with terminal.raw_terminal(on_input, lambda: None):
        os.write(pipe, b"echo one\n")
        os.close(pipe)
        assert thrice.wait(10)
    assert typed.startswith(b"echo one\n\x04\x04\x04")
    assert set(typed[9:]) == {4}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The other end of a terminal on standard input."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "r+b", buffering=0) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield master
    os.close(master)


def test_the_size_is_passed_on_at_the_start_and_at_each_change(screen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", sys.stdin)
    sizes: queue.Queue[tuple[int, int]] = queue.Queue()

    def received() -> tuple[int, int]:
        return sizes.get(timeout=10)

    assert terminal.terminal_size() == (24, 80), "a terminal without a size"
    termios.tcsetwinsize(screen, (30, 100))
    before = signal.getsignal(signal.SIGWINCH)
    with terminal.raw_terminal(lambda data: 0, lambda: None, lambda rows, columns: sizes.put((rows, columns))):
        assert received() == (30, 100)
        for size in ((50, 132), (10, 20)):
            termios.tcsetwinsize(screen, size)
            signal.raise_signal(signal.SIGWINCH)
            assert received() == size
    assert signal.getsignal(signal.SIGWINCH) is before
    signal.raise_signal(signal.SIGWINCH)
    assert sizes.empty()


def test_resizes_without_a_reader_do_not_block(screen: int) -> None:
    """The keyboard's thread has ended at the escape; the terminal may still change its size."""
    escaped = threading.Event()
    with terminal.raw_terminal(lambda data: 0, escaped.set):
        os.write(screen, terminal.ESCAPE)
        assert escaped.wait(10)
        for _ in range(70_000):
            signal.raise_signal(signal.SIGWINCH)


def test_the_terminal_is_restored_without_a_thread(screen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = termios.tcgetattr(screen)
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"), terminal.raw_terminal(lambda data: 0, lambda: None):
        pytest.fail("it has begun")
    assert termios.tcgetattr(screen) == before


def test_a_guest_that_ends_first_is_not_waited_for(pipe: int) -> None:
    with terminal.raw_terminal(lambda data: 0, lambda: None):
        pass
    os.close(pipe)
