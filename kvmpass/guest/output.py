"""What the guest sends through its serial ports, on its way to somebody who may read slowly."""

from __future__ import annotations

import threading
from collections.abc import Callable

Sink = Callable[[bytes], None]


class OutputWriter:
    """Writes what the guest's serial ports send in larger pieces, from a thread of its own.

    The sinks take everything at once; a guest that sends more than ``PENDING_LIMIT`` bytes ahead of a slow reader
    blocks in ``throttle``, as at a slow line, until ``stopped`` says that nobody waits for it any more. ``failure``
    is what a sink raised.
    """

    PENDING_LIMIT = 1 << 20

    def __init__(self, on_failure: Callable[[], None], stopped: Callable[[], bool]) -> None:
        self._pending: dict[Sink, bytearray] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._full = False
        self._on_failure = on_failure
        self._stopped = stopped
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def to(self, sink: Sink) -> Sink:
        """A sink that hands over to ``sink`` later."""

        def put(data: bytes) -> None:
            with self._changed:
                if not self._given_up():
                    pending = self._pending.setdefault(sink, bytearray())
                    pending.extend(data)
                    self._full = self._full or len(pending) > self.PENDING_LIMIT
                    self._changed.notify_all()

        return put

    def throttle(self) -> None:
        """Comes back when there is room again. Cheap while there is."""
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
        """Write out what is left and end the thread; after ``timeout`` seconds leave it to its slow reader."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
