"""Byte streams between an emulated host and this process: a socket pair for each virtio-serial port."""

from __future__ import annotations

import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Protocol

CHUNK = 1 << 16


class Writer(Protocol):
    """A binary file that output is written to."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``. Raises ``OSError``, or ``ValueError`` for a closed file."""

    def flush(self) -> object:
        """Pass on what is buffered."""


class _Descriptor:
    """A file descriptor as a ``Writer``. It is not closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes, /) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def flush(self) -> None:
        pass


def writer(target: Writer | int | None, default: IO[str]) -> Writer:
    """Return a writer for ``target``, or for the binary stream below ``default``."""
    if isinstance(target, int):
        return _Descriptor(target)
    if target is not None:
        return target
    default.flush()
    return default.buffer if hasattr(default, "buffer") else _Descriptor(default.fileno())


class Channels:
    """A socket pair for each port name: the inner ends are for QEMU, the outer ends for this process."""

    def __init__(self, names: Sequence[str]) -> None:
        pairs = {name: socket.socketpair() for name in names}
        self.outer = {name: pair[0] for name, pair in pairs.items()}
        """The outer ends by port name."""
        self._inner = {name: pair[1] for name, pair in pairs.items()}

    @property
    def inner(self) -> dict[str, int]:
        """File descriptors of the inner ends by port name."""
        return {name: end.fileno() for name, end in self._inner.items()}

    def close_inner(self) -> None:
        """Close the inner ends after QEMU has inherited them, so that QEMU's end is seen as end of file."""
        for end in self._inner.values():
            end.close()

    def close(self) -> None:
        """Close both ends of all ports."""
        for end in (*self.outer.values(), *self._inner.values()):
            end.close()


class Pump(threading.Thread):
    """A thread that copies one port to a writer, and calls ``on_failure`` if the writer raises."""

    def __init__(self, source: socket.socket, target: Writer, on_failure: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._source, self._target, self._on_failure = source, target, on_failure
        self._moved = threading.Condition()
        self._count = 0
        self._ended = False
        self.failure: OSError | ValueError | None = None
        """What the writer raised."""

    def run(self) -> None:
        """Copy until end of file. After a failure of the writer, output is read and dropped."""
        try:
            while data := self._source.recv(CHUNK):
                if self.failure is None:
                    self._copy(data)
                with self._moved:
                    self._count += len(data)
                    self._moved.notify_all()
        except OSError:
            pass  # closed by the main thread: the lab has ended
        finally:
            with self._moved:
                self._ended = True
                self._moved.notify_all()

    def _copy(self, data: bytes) -> None:
        try:
            self._target.write(data)
            self._target.flush()
        except (OSError, ValueError) as error:
            self.failure = error
            self._on_failure()

    def wait_for(self, count: int, deadline: float) -> bool:
        """Wait until ``count`` bytes have been copied, or for end of file; ``False`` if the deadline comes first."""
        with self._moved:
            return self._moved.wait_for(
                lambda: self._count >= count or self._ended,
                None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()),
            )


class Feeder(threading.Thread):
    """A thread that copies a descriptor to a port, end of file included, while its ``with`` block runs.

    Input that it has not read by then is left to the next reader.
    """

    def __init__(self, source: int, target: socket.socket) -> None:
        super().__init__(daemon=True)
        self._source, self._target = source, target
        self._stop_read, self._stop_write = os.pipe()

    def run(self) -> None:
        """Copy until end of file, or until the block ends."""
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(self._stop_read, selectors.EVENT_READ)
                ready.register(self._source, selectors.EVENT_READ)
                while all(key.fd == self._source for key, _ in ready.select()):
                    data = os.read(self._source, CHUNK)
                    if not data:
                        self._target.shutdown(socket.SHUT_WR)
                        return
                    self._target.sendall(data)
        except OSError:
            pass  # the lab has ended

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_write, b"\0")
        self.join(1)
        os.close(self._stop_write)
        os.close(self._stop_read)


class Lines:
    """Lines to and from a port, with deadlines (``time.monotonic``)."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._rest = b""

    def read(self, deadline: float) -> str | None:
        """Return the next line, ``None`` at end of file. Raises ``TimeoutError``."""
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._source.settimeout(min(left, 3600))
            try:
                data = self._source.recv(CHUNK)
            except TimeoutError:
                continue
            except ConnectionError:
                return None
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("utf-8", "replace")

    def send(self, text: str) -> None:
        """Send a text. Raises ``OSError``, ``TimeoutError`` after 10 s."""
        self._source.settimeout(10)
        self._source.sendall(text.encode())
