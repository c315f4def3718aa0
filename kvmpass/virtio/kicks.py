"""Notifications of queues that a thread or another process serves: KVM signals an eventfd, without an exit."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import partial

from kvmpass._eventloop import EventLoop
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.pci.bar import Doorbell
from kvmpass.virtio.transport import Transport

_NOTIFICATION_SIZE = 2  # bytes of the driver's write (Virtual I/O Device 1.2, section 4.1.5.2)


class Kicks:
    """An eventfd for each queue that is deferred or remote, and one thread for the deferred ones. Raises ``OSError``.

    Synchronization: ``stop`` and ``close`` while nobody else uses it, and without the transport's lock.
    """

    def __init__(self, name: str, transport: Transport, deferred: Collection[int], remote: Collection[int]) -> None:
        self._transport = transport
        self._loop = EventLoop(name)
        self._eventfds: dict[int, int] = {}
        self._stopped = False
        with undo_on_error(self.close, self.stop):
            for number in sorted({*deferred, *remote}):
                self._eventfds[number] = eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                if number in deferred:
                    self._loop.add_reader(eventfd, partial(self._serve, number, eventfd))
                transport.queues[number].kick = eventfd

    def _serve(self, number: int, eventfd: int) -> None:
        os.eventfd_read(eventfd)
        self._transport.notify(number)

    def doorbells(self, start: int, step: int) -> list[Doorbell]:
        """Return the doorbells of a BAR with the notifications from ``start`` on, ``step`` bytes for each queue."""
        return [Doorbell(start + step * number, _NOTIFICATION_SIZE, fd) for number, fd in self._eventfds.items()]

    def stop(self) -> None:
        """End the thread. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._loop.close()

    def close(self) -> None:
        """Close the eventfds, which KVM no longer signals. Idempotent."""
        eventfds, self._eventfds = self._eventfds, {}
        run_all(*(partial(os.close, eventfd) for eventfd in eventfds.values()))
