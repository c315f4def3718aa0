"""How a guest's output reaches slow, stalled and absent readers."""

from __future__ import annotations

import os
import select
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpass.cli.assign import descriptor_sink
from kvmpass.errors import KvmpassError
from kvmpass.guest import OutputWriter
from kvmpass.guest.output import write_now


class Vm:
    """What a writer knows of a machine."""

    def __init__(self) -> None:
        self.ended = False

    def stop(self) -> None:
        self.ended = True

    def writer(self) -> OutputWriter:
        return OutputWriter(self.stop, lambda: self.ended)


def test_everything_arrives_in_order() -> None:
    vm, out, err = Vm(), bytearray(), bytearray()
    writer = vm.writer()
    to_out, to_err = writer.to(out.extend), writer.to(err.extend)
    for number in range(5000):
        to_out(b"%d," % number)
        to_err(b"e")
    writer.close()
    writer.close()
    assert out == b"".join(b"%d," % number for number in range(5000))
    assert err == b"e" * 5000


def test_a_stalled_reader_throttles_the_guest_until_it_ends() -> None:
    vm, go = Vm(), threading.Event()
    writer = vm.writer()
    put = writer.to(lambda data: go.wait(60) and None)
    sent = 0

    def guest() -> None:
        nonlocal sent
        while not vm.ended:
            put(bytes(4096))
            writer.throttle()
            sent += 4096

    thread = threading.Thread(target=guest)
    thread.start()
    deadline = time.monotonic() + 20
    while sent < OutputWriter.PENDING_LIMIT:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    assert sent <= 2 * OutputWriter.PENDING_LIMIT + 8192, "bounded, however fast the guest is"
    vm.stop()
    thread.join(10)
    assert not thread.is_alive()
    started = time.monotonic()
    writer.close(0.2)
    assert time.monotonic() - started < 5
    go.set()


def test_single_bytes_for_a_stalled_reader_take_no_more_memory_than_they_are() -> None:
    """A guest writes what it likes, in frames of one byte, to two streams in turns."""
    vm, go = Vm(), threading.Event()
    writer = vm.writer()
    taken = {1: 0, 2: 0}

    def take(stream: int, size: int) -> None:
        taken[stream] += size

    put = writer.to(lambda data: go.wait(60) and None)
    put(b"a", take, 1)
    deadline = time.monotonic() + 20
    while put._pending:  # its thread is in the sink from here on
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tracemalloc.start()
    for _ in range(1 << 16):
        put(b"b", take, 1)
        put(b"c", take, 2)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 1 << 18
    go.set()
    writer.close()
    assert taken == {1: (1 << 16) + 1, 2: 1 << 16}


def test_a_closed_reader_stops_the_guest() -> None:
    reader, output = os.pipe()
    os.close(reader)
    vm = Vm()
    writer = vm.writer()
    writer.to(descriptor_sink(output))(b"x")
    writer.close()
    os.close(output)
    assert vm.ended
    assert isinstance(writer.failure, KvmpassError)
    with pytest.raises(KvmpassError, match="output closed by its reader"):
        raise writer.failure


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, output = os.pipe()
    yield reader, output
    os.close(reader)
    os.close(output)


def test_what_a_descriptor_takes_at_once_needs_no_thread(pipe: tuple[int, int]) -> None:
    reader, output = pipe
    if write_now(output, b"?") is None:
        pytest.skip("needs Linux 6.4: before it a pipe refuses RWF_NOWAIT")
    os.read(reader, 1)
    taken: list[tuple[int, int, str]] = []
    writer = Vm().writer()
    put = writer.to(descriptor_sink(output))
    put(memoryview(b"word"), lambda stream, size: taken.append((stream, size, threading.current_thread().name)), 7)
    assert os.read(reader, 10) == b"word"
    assert taken == [(7, 4, threading.current_thread().name)]
    assert not put.busy
    writer.close()


def test_a_python_without_pwritev2_writes_by_the_thread(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, output = pipe
    monkeypatch.delattr(os, "RWF_NOWAIT")
    writer = Vm().writer()
    writer.to(descriptor_sink(output))(b"word")
    writer.close()
    assert writer.failure is None
    assert os.read(reader, 10) == b"word"


def test_what_a_full_pipe_does_not_take_is_queued(pipe: tuple[int, int]) -> None:
    """In order, and all that is granted is said once."""
    reader, output = pipe
    content, said, read = os.urandom(1_000_000), 0, bytearray()

    def granted(stream: int, size: int) -> None:
        nonlocal said
        said += size

    writer = Vm().writer()
    put = writer.to(descriptor_sink(output))
    sizes = [1, 65_536, 10, 4095, 4096, 4097, 100_000, 3]
    at = 0
    started = time.monotonic()
    while at < len(content):
        size = sizes[at % len(sizes)]
        put(memoryview(content)[at : at + size], granted)
        at += size
        if at % 3 == 0:
            read += os.read(reader, 5000)
    assert time.monotonic() - started < 20
    closing = threading.Thread(target=writer.close)
    closing.start()
    while len(read) < len(content):
        read += os.read(reader, 1 << 16)
    closing.join(20)
    assert (bytes(read) == content, said) == (True, len(content))


def test_a_full_pipe_that_does_not_block_loses_nothing(pipe: tuple[int, int]) -> None:
    """Standard output, which another program has set ``O_NONBLOCK`` on."""
    reader, output = pipe
    os.set_blocking(output, False)
    content, read = os.urandom(200_000), bytearray()
    writer = Vm().writer()
    put = writer.to(descriptor_sink(output))
    for at in range(0, len(content), 4000):
        put(content[at : at + 4000])
    while len(read) < len(content) and select.select([reader], [], [], 20)[0]:
        read += os.read(reader, 1 << 16)
    writer.close()
    assert (writer.failure, bytes(read)) == (None, content)


@pytest.mark.parametrize("kind", ["file", "terminal"])
def test_what_may_block_is_written_by_the_thread(kind: str, tmp_path: Path) -> None:
    """Files, whose disk may be slow, and terminals, which refuse RWF_NOWAIT."""
    master, output = os.openpty()
    if kind == "file":
        os.close(output)
        output = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    names: list[str] = []
    writer = Vm().writer()
    writer.to(descriptor_sink(output))(b"word", lambda stream, size: names.append(threading.current_thread().name))
    writer.close()
    assert names == ["output"]
    assert (os.pread(output, 9, 0) if kind == "file" else os.read(master, 9)) == b"word"
    os.close(master)
    os.close(output)
