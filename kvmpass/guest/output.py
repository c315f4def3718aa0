"""The output of the guest's serial ports, written to readers that may be slow."""

from __future__ import annotations

import threading
from collections.abc import Callable

Sink = Callable[[bytes], None]


class OutputWriter:
    """Write the output of serial ports from a thread of its own.

    The sinks of ``to`` return at once. ``throttle`` blocks while more than ``PENDING_LIMIT`` bytes are pending for a
    reader, until ``stopped`` returns True. ``on_failure`` is called from the thread when a reader's sink has raised.

    Synchronization: from any thread.
    """

    PENDING_LIMIT = 1 << 20
    """Bytes pending for one reader."""

    def __init__(self, on_failure: Callable[[], None], stopped: Callable[[], bool]) -> None:
        self._pending: dict[Sink, bytearray] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._full = False
        self._on_failure = on_failure
        self._stopped = stopped
        self.failure: BaseException | None = None
        """What a reader's sink raised."""
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def to(self, sink: Sink) -> Sink:
        """Return a sink that queues bytes for ``sink``."""

        def put(data: bytes) -> None:
            with self._changed:
                if not self._given_up():
                    pending = self._pending.setdefault(sink, bytearray())
                    pending.extend(data)
                    self._full = self._full or len(pending) > self.PENDING_LIMIT
                    self._changed.notify_all()

        return put

    def throttle(self) -> None:
        """Block until fewer bytes are pending. Cheap while they are."""
        if self._full:
            with self._changed:
                while self._full and not self._given_up():
                    self._changed.wait(0.1)

    def _given_up(self) -> bool:
        return self._closing or self.failure is not None or self._stopped()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._closing)
                    pending, self._pending, self._full = self._pending, {}, False
                    self._changed.notify_all()
                    if not pending:
                        return
                for sink, data in pending.items():
                    sink(bytes(data))
        except BaseException as error:
            self.failure = error
            self._on_failure()

    def close(self, timeout: float | None = None) -> None:
        """Write what is pending, and end the thread; wait for it ``timeout`` seconds at most. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
