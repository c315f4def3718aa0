"""The output of the guest's ports, written to readers that may be slow."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable

from kvmpass.guest.frames import Payload

Sink = Callable[[bytes], None]
Taken = Callable[[int, int], object]
"""Called with a stream and a number of bytes."""
_ALONE = 4096  # bytes that are not joined with others
_POSITION = -1  # the descriptor's own, as for write(2)


def write_now(fd: int, data: Payload) -> int | None:
    """Write as much of ``data`` as ``fd`` takes without blocking, and return how many bytes.

    A pipe that another process writes to or reads just then may take none, although there is room.

    None where this cannot be done for a descriptor that blocks: the kernel refuses ``RWF_NOWAIT`` for terminals, for
    named pipes, and before Linux 6.4 for all pipes; a Python made for a C library without pwritev2(2) lacks it.
    Raises ``OSError``.
    """
    nowait = getattr(os, "RWF_NOWAIT", 0)
    try:
        if not os.get_blocking(fd):
            return os.write(fd, data)
        return os.pwritev(fd, [data], _POSITION, nowait) if nowait else None
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return 0
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise


def is_on_disk(fd: int) -> bool:
    """Return whether ``fd`` is a file or a block device: poll(2) does not wait until these take more."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


class DescriptorSink:
    """A sink that writes to ``fd`` by ``write``, which may block, and without it what ``fd`` takes at once.

    Synchronization: by one ``Outlet``, with its writer's lock.
    """

    def __init__(self, fd: int, write: Sink) -> None:
        self._fd = fd
        self._write = write
        self._on_disk = is_on_disk(fd)  # which may be slow

    def __call__(self, data: bytes) -> None:
        """Write all of ``data``."""
        self._write(data)

    def now(self, data: Payload) -> int:
        """See ``write_now``, 0 for None. A descriptor that fails is left to ``write``, which raises."""
        try:
            return 0 if self._on_disk else write_now(self._fd, data) or 0
        except OSError:
            return 0


class Outlet:
    """Queues bytes for one reader's sink, which a thread of its own calls.

    What a ``DescriptorSink`` takes at once, while nothing is queued, is written without the thread.

    Synchronization: from any thread; made by ``OutputWriter.to``.
    """

    def __init__(self, writer: OutputWriter, sink: Sink) -> None:
        self._writer = writer
        self.sink = sink
        """The reader's."""
        # Small ones are joined: a guest that writes single bytes would fill memory.
        self._pending: list[bytes | bytearray] = []
        self._size = 0
        self._taken: dict[tuple[Taken, int], int] = {}  # whom to tell of how many of these bytes
        self._writing = False
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def __call__(self, data: Payload, taken: Taken | None = None, stream: int = 0) -> None:
        """Write or queue ``data``, without blocking. Dropped once the writer is closed, or a sink has failed.

        ``taken`` is called with ``stream`` and a size, here or from the thread, once the reader has so much of it.
        """
        with self._writer.changed:
            if self._writer.ended:
                return
            done = 0
            if isinstance(self.sink, DescriptorSink) and not (self._pending or self._writing):
                done = self.sink.now(data)
            if done < len(data):
                self._queue(data[done:])
                if taken is not None:
                    self._taken[taken, stream] = self._taken.get((taken, stream), 0) + len(data) - done
                self._writer.changed.notify_all()
        if done and taken is not None:
            taken(stream, done)

    def _queue(self, data: Payload) -> None:
        self._size += len(data)
        if len(data) >= _ALONE:
            self._pending.append(bytes(data))
        elif self._pending and isinstance(self._pending[-1], bytearray):
            self._pending[-1] += data
        else:
            self._pending.append(bytearray(data))

    @property
    def full(self) -> bool:
        """Whether more than ``OutputWriter.PENDING_LIMIT`` bytes are pending."""
        return self._size > OutputWriter.PENDING_LIMIT

    @property
    def busy(self) -> bool:
        """Whether bytes are pending, or the reader's sink has not returned."""
        with self._writer.changed:
            return self._writing or bool(self._pending)

    def join(self, timeout: float | None) -> None:
        """Wait until what is pending is written, after the writer was closed."""
        self._thread.join(timeout)

    def _run(self) -> None:
        changed = self._writer.changed
        try:
            while True:
                with changed:
                    self._writing = False
                    changed.wait_for(lambda: self._pending or self._writer.ended)
                    pending, self._pending = self._pending, []
                    self._size = 0
                    owed, self._taken = self._taken, {}
                    changed.notify_all()
                    if self._writer.failure is not None or not pending:
                        return
                    self._writing = True
                for data in pending:
                    self.sink(bytes(data))
                for (taken, stream), size in owed.items():
                    taken(stream, size)
        except BaseException as error:
            self._writer.fail(error)


class OutputWriter:
    """Write the output of ports from threads of its own, one for each reader: one that stalls delays no other.

    The sinks of ``to`` return at once. ``throttle`` blocks while more than ``PENDING_LIMIT`` bytes are pending for a
    reader, until ``stopped`` returns True. ``on_failure`` is called from a thread when a reader's sink has raised.

    Synchronization: from any thread. ``changed`` guards all; callbacks are called without it.
    """

    PENDING_LIMIT = 1 << 20
    """Bytes pending for one reader, at which a serial port's vCPU waits."""

    def __init__(self, on_failure: Callable[[], None], stopped: Callable[[], bool]) -> None:
        self.changed = threading.Condition()
        """Notified when bytes are queued or taken, and at the end."""
        self._outlets: list[Outlet] = []
        self._closing = False
        self._on_failure = on_failure
        self._stopped = stopped
        self.failure: BaseException | None = None
        """What a reader's sink raised."""

    def to(self, sink: Sink) -> Outlet:
        """Return what queues bytes for ``sink``: for one sink always the same, which keeps their order."""
        outlet = next((known for known in self._outlets if known.sink == sink), None)
        if outlet is None:
            outlet = Outlet(self, sink)
            self._outlets.append(outlet)
        return outlet

    @property
    def ended(self) -> bool:
        """Whether nothing more is queued."""
        return self._closing or self.failure is not None

    @property
    def _full(self) -> bool:
        return any(outlet.full for outlet in self._outlets)

    def throttle(self) -> None:
        """Block until fewer bytes are pending. Cheap while they are."""
        if self._full:
            with self.changed:
                while self._full and not self.ended and not self._stopped():
                    self.changed.wait(0.1)

    def fail(self, error: BaseException) -> None:
        """End all output: a reader's sink has raised ``error``."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()
        self._on_failure()

    def close(self, timeout: float | None = None) -> None:
        """Write what is pending, and end the threads; wait for them ``timeout`` seconds at most. Idempotent."""
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        deadline = None if timeout is None else time.monotonic() + timeout
        for outlet in self._outlets:
            outlet.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
