"""Standard input for a command in the guest: its end, a guest that does not read, and an end of the run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmpass.cli.input import passed_input
from kvmpass.guest.frames import DATA, END, FrameReader
from kvmpass.guest.input import Input
from kvmpass.session import streams


class Command(Input):
    """The input of a command that reads when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._frames, self._sent = FrameReader(), bytearray()
        self.ended = False
        self.detach()
        self.attach(1, self._on_frame)

    def _on_frame(self, data: bytes) -> None:
        for frame in self._frames.feed(data):
            self.ended = frame.type == END
            self._sent += frame.payload if frame.type == DATA else b""

    def take(self, size: int) -> bytes:
        """Read at most ``size`` bytes, as far as they have been sent."""
        data = bytes(self._sent[:size])
        del self._sent[:size]
        assert self.granted(len(data))
        return data


class Typed:
    """A pipe in place of standard input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.writing = os.pipe()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: self.reading))

    def end(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
        self.writing = -1


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Typed]:
    typed, threads = Typed(monkeypatch), threading.active_count()
    descriptors = len([*Path("/proc/self/fd").iterdir()])
    yield typed
    assert threading.active_count() == threads
    assert len([*Path("/proc/self/fd").iterdir()]) == descriptors - (typed.writing < 0)
    typed.end()
    os.close(typed.reading)


@pytest.fixture
def command() -> Command:
    return Command()


def wait_until(command: Command, size: int) -> None:
    deadline = time.monotonic() + 10
    while command.waiting < size and time.monotonic() < deadline:
        time.sleep(0.001)


def test_everything_is_sent_and_then_the_end(typed: Typed, command: Command) -> None:
    with passed_input(command):
        os.write(typed.writing, b"first\0\xff")
        wait_until(command, 7)
        assert (command.take(100), command.ended) == (b"first\0\xff", False)
        os.write(typed.writing, b"last")
        typed.end()
        deadline = time.monotonic() + 10
        while not command.ended and time.monotonic() < deadline:
            time.sleep(0.001)
    assert (command.take(100), command.ended) == (b"last", True)


def test_a_guest_that_does_not_read_stops_the_reading(
    typed: Typed, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is bounded; when it reads, the rest comes; the end of the run does not wait for it."""
    monkeypatch.setattr(streams, "_CHUNK", 1000)
    monkeypatch.setattr(streams, "BACKLOG", 3000)
    sent = os.urandom(20_000)
    with passed_input(command):
        os.write(typed.writing, sent)
        wait_until(command, 3000)
        time.sleep(0.05)
        assert 3000 <= command.waiting < 4000
        taken = command.take(1000)
        deadline = time.monotonic() + 10
        while len(taken) < len(sent) and time.monotonic() < deadline:
            taken += command.take(500)
            time.sleep(0.001)
        assert taken == sent
        os.write(typed.writing, sent)
        wait_until(command, 3000)
        before = time.monotonic()
    assert time.monotonic() - before < 5
    assert not command.ended


def test_a_terminal_that_has_gone_is_the_end(typed: Typed, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(fd: int, size: int) -> bytes:
        raise OSError(5, "Input/output error")

    with passed_input(command), monkeypatch.context() as patch:
        patch.setattr(os, "read", gone)
        os.write(typed.writing, b"x")
        deadline = time.monotonic() + 10
        while not command.ended and time.monotonic() < deadline:
            time.sleep(0.001)
    assert command.ended
    assert command.waiting == 0


def test_the_run_may_end_before_any_input(typed: Typed, command: Command) -> None:
    with pytest.raises(KeyboardInterrupt), passed_input(command):
        raise KeyboardInterrupt
    assert not command.ended
