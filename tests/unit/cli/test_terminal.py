"""Standard input of a guest's shell, where it is no terminal."""

from __future__ import annotations

import os
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
    """All of it arrives, then Ctrl-D, again and again: a program in the shell may have taken the first one."""
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


def test_a_guest_that_ends_first_is_not_waited_for(pipe: int) -> None:
    with terminal.raw_terminal(lambda data: 0, lambda: None):
        pass
    os.close(pipe)
