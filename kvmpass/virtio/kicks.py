"""Notifications of queues that a thread serves: KVM signals an eventfd, and the guest does not exit."""

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
    """An eventfd for each of ``queues`` of ``transport``, and one thread for all. Raises ``OSError``.

    Synchronization: ``close`` while nobody else uses it, and without the transport's lock.
    """

    def __init__(self, name: str, transport: Transport, queues: Collection[int]) -> None:
        self._transport = transport
        self._loop = EventLoop(name)
        self._eventfds: dict[int, int] = {}
        self._closed = False
        with undo_on_error(self.close):
            for number in sorted(queues):
                self._eventfds[number] = eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._loop.add_reader(eventfd, partial(self._serve, number, eventfd))

    def _serve(self, number: int, eventfd: int) -> None:
        os.eventfd_read(eventfd)
        self._transport.notify(number)

    def doorbells(self, start: int, step: int) -> list[Doorbell]:
        """Return the doorbells of a BAR with the notifications from ``start`` on, ``step`` bytes for each queue."""
        return [Doorbell(start + step * number, _NOTIFICATION_SIZE, fd) for number, fd in self._eventfds.items()]

    def close(self) -> None:
        """End the thread, and close the eventfds. Idempotent."""
        if not self._closed:
            self._closed = True
            run_all(self._loop.close, *(partial(os.close, eventfd) for eventfd in self._eventfds.values()))
