"""Descriptors whose input is passed to a process in a guest."""

from __future__ import annotations

import fcntl
import os
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from kvmpass.errors import GuestDied
from kvmpass.guest.agent import Agent
from kvmpass.guest.frames import OUTPUT, Payload
from kvmpass.guest.input import Input
from kvmpass.guest.output import DescriptorSink, OutputWriter
from kvmpass.guest.process import AgentProcess
from kvmpass.session import streams
from kvmpass.session.streams import Cancel, InputPump, OutputPipe, ToDescriptor, duplicate, write_to


class FasterReader(Cancel):
    """Another reader takes what a descriptor has, each time that it was ready."""

    def __init__(self) -> None:
        super().__init__()
        self.emptied = threading.Event()

    def wait(self, fd: int, events: int) -> bool:
        ready = super().wait(fd, events)
        if ready:
            os.read(fd, 100)
            self.emptied.set()
        return ready


def test_another_reader_of_the_same_pipe_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_JOIN_SECONDS", 0.1)
    read, write = os.pipe()
    input, cancel = Input(), FasterReader()
    pump = InputPump(read, input, cancel)
    os.write(write, b"taken")
    assert cancel.emptied.wait(20)  # its thread reads an empty pipe now
    cancel.set()
    joining = threading.Thread(target=pump.join, daemon=True)
    joining.start()
    joining.join(20)
    assert not joining.is_alive()
    cancel.close()
    os.write(write, b"too late")
    pump._thread.join(20)
    assert not pump._thread.is_alive()
    assert input.waiting == 0
    os.close(write)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


class FasterWriter(Cancel):
    """Another writer fills a pipe, the first time that it was writable."""

    filled = 0

    def __init__(self) -> None:
        super().__init__()
        self.full = threading.Event()

    def wait(self, fd: int, events: int) -> bool:
        ready = super().wait(fd, events)
        if ready and not self.filled:
            self.filled = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            os.write(fd, bytes(self.filled))
            self.full.set()
        return ready


@pytest.mark.parametrize("cancelled", [True, False])
def test_another_writer_of_the_same_pipe_does_not_block(cancelled: bool) -> None:
    """Two commands have this process's output, say, and its reader stalls, for a while or for ever."""
    read, shared = os.pipe()
    write = duplicate(shared)
    assert (os.get_blocking(shared), os.get_blocking(write)) == (True, False)
    cancel, written = FasterWriter(), list[bool]()
    writing = threading.Thread(target=lambda: written.append(write_to(write, cancel, b"word")), daemon=True)
    writing.start()
    assert cancel.full.wait(20)
    if cancelled:
        cancel.set()
    else:
        assert os.read(read, cancel.filled) == bytes(cancel.filled)
    writing.join(20)
    assert written == [not cancelled]
    if not cancelled:
        assert os.read(read, 10) == b"word"
    cancel.close()
    for fd in (read, write, shared):
        os.close(fd)


def test_what_cannot_be_opened_again_is_the_same(tmp_path: Path) -> None:
    """A pipe that nobody reads, the end for reading, a file, which keeps its position."""
    read, write = os.pipe()
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    made = [duplicate(read), duplicate(file)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(made[0], b"?")
    os.write(file, b"one")
    os.write(made[1], b"two")
    assert (tmp_path / "file").read_bytes() == b"onetwo"
    os.close(made[0])
    os.close(read)
    made[0] = duplicate(write)
    with pytest.raises(BrokenPipeError):
        os.write(made[0], b"?")
    for fd in (write, file, *made):
        os.close(fd)


def test_a_fifo_that_is_open_for_both_directions_does_not_block(tmp_path: Path) -> None:
    """As of ``exec 3<>FIFO`` in a shell, with which several writers share a description."""
    os.mkfifo(tmp_path / "fifo")
    shared = os.open(tmp_path / "fifo", os.O_RDWR)
    write = duplicate(shared)
    assert (os.get_blocking(shared), os.get_blocking(write)) == (True, False)
    os.write(write, b"word")
    assert os.read(shared, 10) == b"word"
    for fd in (shared, write):
        os.close(fd)


def test_single_bytes_in_a_pipe_that_is_not_read_take_no_more_memory_than_they_are() -> None:
    """A guest writes what it likes, in frames of one byte."""
    granted: list[int] = []
    process = cast(AgentProcess, SimpleNamespace(grant=lambda stream, size: granted.append(size)))
    agent = cast(Agent, SimpleNamespace(changed=threading.Condition(), failure=None))
    pipe = OutputPipe(agent, GuestDied)
    tracemalloc.start()
    for _ in range(1 << 16):
        pipe(process, OUTPUT, b"a")
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 1 << 17
    assert granted == []
    assert pipe.read(10) == b"a" * 10
    pipe.close()
    assert granted == [10, (1 << 16) - 10]


def test_output_that_was_written_when_another_reader_closes_is_granted_once() -> None:
    """The readers of a process's streams share a writer, which ends for both."""
    granted: list[int] = []

    class Sink(DescriptorSink):
        def now(self, data: Payload) -> int:
            writer.fail(BrokenPipeError())  # as the thread of the other reader could, once this has returned
            return len(data)

    process = cast(
        AgentProcess,
        SimpleNamespace(grant=lambda stream, size: granted.append(size), send_signal=lambda number: None),
    )
    writer = OutputWriter(lambda: to.fail(), lambda: False)
    to = ToDescriptor(writer, Sink(1, lambda data: None))
    to(process, OUTPUT, b"word")
    writer.close()
    assert granted == [4]
    assert not to.pending
