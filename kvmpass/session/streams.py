"""Where the streams of a process in a guest go: into memory, to descriptors of this process, nowhere."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kvmpass._teardown import undo_on_error
from kvmpass.errors import GuestDied

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from kvmpass.guest.agent import Agent
    from kvmpass.guest.frames import Payload
    from kvmpass.guest.input import Input
    from kvmpass.guest.output import OutputWriter, Sink
    from kvmpass.guest.process import AgentProcess

MAX_CAPTURED = 256 << 20
"""Bytes of both streams of one process that ``Session.run`` keeps."""
BACKLOG = 1 << 18
"""Bytes of a process's input that wait here."""
_CHUNK = 1 << 16
_JOIN_SECONDS = 1.0
_RETRY_SECONDS = 0.001
_ATOMIC = select.PIPE_BUF  # bytes that a pipe takes without blocking, once it is writable


class Capture:
    """Keep all that a process writes to its streams, ``MAX_CAPTURED`` bytes at most; more of it ends the process.

    Synchronization: called by the agent; read it once the process has ended.
    """

    def __init__(self) -> None:
        self._kept: dict[int, bytearray] = {}
        self._size = 0

    def __call__(self, process: AgentProcess, stream: int, data: Payload) -> None:
        """Take ``data`` from the process."""
        self._size += len(data)
        if self.full:
            process.kill()
        else:
            self._kept.setdefault(stream, bytearray()).extend(data)
        process.grant(stream, len(data))

    @property
    def full(self) -> bool:
        """Whether more was written than is kept."""
        return self._size > MAX_CAPTURED

    def data(self, stream: int) -> bytes:
        """Return what was written to a stream."""
        return bytes(self._kept.get(stream, b""))


class OutputPipe(io.RawIOBase):
    """Output of a process, to be read here as a file. Closed, it drops what comes.

    Synchronization: from any thread, one at a time; the agent's ``changed`` guards what is kept.
    """

    def __init__(self, agent: Agent, died: Callable[[str], GuestDied]) -> None:
        super().__init__()
        self._agent = agent
        self._died = died
        self._kept = bytearray()
        self._grant: Callable[[int], None] | None = None  # so many bytes more
        self._ended = self._dropping = False

    def __call__(self, process: AgentProcess, stream: int, data: Payload) -> None:
        """Take ``data`` from the process; nothing more comes after an empty one."""
        with self._agent.changed:
            dropping = self._dropping
            self._grant = self._grant or partial(process.grant, stream)
            if not dropping:
                self._kept += data
            self._ended = not data
            self._agent.changed.notify_all()
        if dropping:
            process.grant(stream, len(data))

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read what there is into ``buffer``; blocks while there is nothing. Raises ``GuestDied``."""
        view = memoryview(buffer).cast("B")
        changed = self._agent.changed
        with changed:
            changed.wait_for(lambda: self._kept or self._ended or self._agent.failure is not None)
            if not self._kept:
                if not self._ended:
                    raise self._died(self._agent.failure or "")
                return 0
            data = self._kept[: len(view)]
            del self._kept[: len(data)]
        view[: len(data)] = data
        self._give_back(len(data))
        return len(data)

    def close(self) -> None:
        """Drop what is kept, and what comes. Idempotent."""
        with self._agent.changed:
            self._dropping = True
            size = len(self._kept)
            self._kept.clear()
        self._give_back(size)
        super().close()

    def _give_back(self, size: int) -> None:
        if self._grant is not None:
            self._grant(size)


class InputPipe(io.RawIOBase):
    """The input of a process, to be written here as a file. Closing it ends the input.

    Synchronization: from any thread, one at a time.
    """

    def __init__(self, agent: Agent, input: Input) -> None:
        super().__init__()
        self._agent = agent
        self._input = input

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: ReadableBuffer) -> int:
        """Write all of ``data``, as fast as the process reads it. What nobody reads any more is dropped."""
        content = bytes(data)
        self._input.send(content)
        while not self._input.wait_below(BACKLOG, 1.0) and self._agent.failure is None:
            pass
        return len(content)

    def close(self) -> None:
        """End the input. Idempotent."""
        if not self.closed:
            self._input.end()
        super().close()


class Cancel:
    """Wakes threads that wait for a descriptor. ``close`` it once they have ended.

    Synchronization: from any thread; ``_lock`` guards the descriptor's end.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_set = False
        """Whether ``set`` was called."""
        self._lock = threading.Lock()

    def set(self) -> None:
        """Wake the threads, also those that wait later. Does nothing once it is closed."""
        self.is_set = True
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def wait(self, fd: int, events: int) -> bool:
        """Wait until ``fd`` is ready for ``events`` of poll(2), or has failed; False if this is set."""
        if self.is_set:  # it may be closed as well
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(fd, events)
        return all(ready != self._fd for ready, _ in poll.poll())

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def duplicate(fd: int) -> int:
    """Return a duplicate of a descriptor to write to, of a pipe with a description of its own that does not block.

    That of ``fd`` may be shared with others who expect it to block, and before Linux 6.4 the kernel refuses
    ``RWF_NOWAIT`` for pipes (fs/pipe.c: ``FMODE_NOWAIT``). Raises ``OSError``.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if stat.S_ISFIFO(os.fstat(fd).st_mode) and flags & os.O_ACCMODE != os.O_RDONLY:
        writing = flags & ~os.O_ACCMODE | os.O_WRONLY  # a FIFO may be open for both
        with suppress(OSError):  # nobody reads it, or another user has made it
            return os.open(f"/proc/self/fd/{fd}", writing | os.O_NONBLOCK | os.O_CLOEXEC)
    return os.dup(fd)


def write_to(fd: int, cancel: Cancel, data: bytes) -> bool:
    """Write ``data`` to ``fd``; return False if ``cancel`` was set before all is written. Raises ``OSError``.

    A reader that stalls cannot block it: a pipe, socket or terminal gets no more at once than it takes. But where
    ``write_now`` is None another writer may take the room between poll(2) and write(2): ``duplicate`` a pipe first.
    """
    # Clients, which import this module, load nothing of a guest.
    from kvmpass.guest.output import is_on_disk, write_now

    on_disk = is_on_disk(fd)
    view = memoryview(data)
    while view:
        if not cancel.wait(fd, select.POLLOUT):
            return False
        with suppress(BlockingIOError):
            done = None if on_disk else write_now(fd, view)
            if done is None:
                done = os.write(fd, view if on_disk else view[:_ATOMIC])
            elif not done:  # another writer has filled it, or holds the pipe's lock: for that poll does not wait
                time.sleep(_RETRY_SECONDS)
            view = view[done:]
    return True


class InputLike(Protocol):
    """What takes bytes as fast as the guest reads them: ``kvmpass.guest.input.Input``, or a console."""

    def send(self, data: bytes) -> int:
        """Send ``data``. Return how many bytes were not read yet."""

    def wait_below(self, size: int, timeout: float) -> bool:
        """Wait until less than ``size`` bytes wait, ``timeout`` seconds at most; return whether."""

    def end(self) -> None:
        """Send nothing more."""


class InputPump:
    """Pass what a descriptor has to an input until its end, in a thread. It owns the descriptor.

    ``cancel`` ends the thread, and not the input.
    """

    def __init__(self, fd: int, input: InputLike, cancel: Cancel) -> None:
        self._fd, self._input, self._cancel = fd, input, cancel
        self._thread = threading.Thread(target=self._run, name="input", daemon=True)
        with undo_on_error(partial(os.close, fd)):
            self._thread.start()

    def _run(self) -> None:
        try:
            while self._cancel.wait(self._fd, select.POLLIN):
                try:
                    data = os.read(self._fd, _CHUNK)
                except BlockingIOError:
                    continue
                except OSError:  # the terminal has gone
                    data = b""
                if self._cancel.is_set:
                    return
                if not data:
                    self._input.end()
                    return
                self._input.send(data)
                while not self._input.wait_below(BACKLOG, 0.1):
                    if self._cancel.is_set:
                        return
        finally:
            os.close(self._fd)

    def join(self) -> None:
        """Wait for its thread, once ``cancel`` was set; a second at most.

        If another reader of the same pipe or terminal was faster, the thread is blocked until there is more to read,
        or its end. Then it ends, and drops that.
        """
        self._thread.join(_JOIN_SECONDS)


class ToDescriptor:
    """Write one output stream of a process to a descriptor, through a thread of ``writer``.

    Once the descriptor's reader has gone the process gets SIGPIPE, and what it still writes is dropped.

    Synchronization: called by the agent and by the writer's thread, ``_lock`` guards what is owed.
    """

    def __init__(self, writer: OutputWriter, sink: Sink) -> None:
        self._writer = writer
        self._outlet = writer.to(sink)
        self._lock = threading.Lock()
        self._owed: dict[int, int] = {}  # bytes that are queued, by stream
        self._process: AgentProcess | None = None

    def __call__(self, process: AgentProcess, stream: int, data: Payload) -> None:
        """Queue ``data`` from the process."""
        with self._lock:
            self._process = process
            failed = self._writer.failure is not None
            if not failed:
                self._owed[stream] = self._owed.get(stream, 0) + len(data)
        if failed:
            process.grant(stream, len(data))
        elif data:
            try:
                self._outlet(data, self._taken, stream)
            except Exception as error:  # no memory, say; what is owed would never be taken
                self._writer.fail(error)

    def _taken(self, stream: int, size: int) -> None:
        with self._lock:
            owed = stream in self._owed  # the writer may have failed since, which has granted all
            if owed:
                self._owed[stream] -= size
        if owed and self._process is not None:
            self._process.grant(stream, size)

    @property
    def pending(self) -> bool:
        """Whether some of it is not written yet."""
        return any(self._owed.values())

    def fail(self) -> None:
        """Note that the writer has failed: nothing that is queued will be written."""
        with self._lock:
            owed, self._owed = self._owed, {}
        if self._process is not None:
            self._process.send_signal(signal.SIGPIPE)
            for stream, size in owed.items():
                self._process.grant(stream, size)
