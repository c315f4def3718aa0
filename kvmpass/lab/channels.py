"""The bytes between a lab and the process that runs it: one socket pair for each port of the emulated host."""

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
    """What output is written to: a binary file."""

    def write(self, data: bytes, /) -> object: ...
    def flush(self) -> object: ...


class _Descriptor:
    """A file descriptor as a ``Writer``; it stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: bytes, /) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def flush(self) -> None:
        pass


def writer(target: Writer | int | None, default: IO[str]) -> Writer:
    """``target``, or the binary stream under ``default``."""
    if isinstance(target, int):
        return _Descriptor(target)
    if target is not None:
        return target
    default.flush()
    return default.buffer if hasattr(default, "buffer") else _Descriptor(default.fileno())


class Channels:
    """Socket pairs by port name: ``inner`` ends are for QEMU, ``outer`` ends for us."""

    def __init__(self, names: Sequence[str]) -> None:
        pairs = {name: socket.socketpair() for name in names}
        self.outer = {name: pair[0] for name, pair in pairs.items()}
        self._inner = {name: pair[1] for name, pair in pairs.items()}

    @property
    def inner(self) -> dict[str, int]:
        return {name: end.fileno() for name, end in self._inner.items()}

    def close_inner(self) -> None:
        """Once QEMU has its own: so that its end is seen as end of file."""
        for end in self._inner.values():
            end.close()

    def close(self) -> None:
        for end in (*self.outer.values(), *self._inner.values()):
            end.close()


class Pump(threading.Thread):
    """Copies one port to a writer as the bytes come. ``failure`` is what the writer raised, if it did."""

    def __init__(self, source: socket.socket, target: Writer, on_failure: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._source, self._target, self._on_failure = source, target, on_failure
        self._moved = threading.Condition()
        self._count = 0
        self._ended = False
        self.failure: OSError | ValueError | None = None

    def run(self) -> None:
        try:
            while data := self._source.recv(CHUNK):
                if self.failure is None:
                    self._copy(data)
                with self._moved:
                    self._count += len(data)
                    self._moved.notify_all()
        except OSError:
            pass  # closed under us: the lab is over
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
        """Wait until ``count`` bytes have been copied, or the port's end; ``False`` when time is up first."""
        with self._moved:
            return self._moved.wait_for(
                lambda: self._count >= count or self._ended,
                None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()),
            )


class Feeder(threading.Thread):
    """Copies a descriptor's bytes into a port while its ``with`` block runs, and passes end of file on.

    What it has not read by then is left to the next reader.
    """

    def __init__(self, source: int, target: socket.socket) -> None:
        super().__init__(daemon=True)
        self._source, self._target = source, target
        self._stop_read, self._stop_write = os.pipe()

    def run(self) -> None:
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
            pass  # the lab is over

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_write, b"\0")
        self.join(1)
        os.close(self._stop_write)
        os.close(self._stop_read)


class Lines:
    """Lines from a port, with deadlines."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._rest = b""

    def read(self, deadline: float) -> str | None:
        """The next line; ``None`` at the end. Raises ``TimeoutError``."""
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
        self._source.settimeout(10)
        self._source.sendall(text.encode())
