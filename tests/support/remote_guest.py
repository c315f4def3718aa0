"""A guest's driver of a device that a daemon, a thread of this process, serves."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmpass.memory import Backing
from kvmpass.virtio.frontend import FrontEnd
from kvmpass.virtio.remote import RemoteDevice
from kvmpass.virtio.transport import DRIVER_OK, NEEDS_RESET
from support.vhost_daemon import Daemon
from support.virtio_driver import NEXT, WRITE, Driver

QUEUES = (16, 32, 16)
SILENT = ("silent", "half of it")


class Guest(Driver):
    """A driver of a function whose queues ``daemon`` serves."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.reasons: list[str] = []
        super().__init__(doorbells=True, backing=Backing.MEMFD)

    def make(self) -> None:
        if not hasattr(self, "front"):
            connection, heard = self.daemon.front, self.reasons.append
            self.front = FrontEnd("it", connection, self.memory, heard)
        self.remote = RemoteDevice(
            self.front, device_type=2, class_code=0x010000, features=1, queues=QUEUES, config=b"config"
        )
        self.plug(self.remote)
        self.rings = []

    def close(self) -> None:
        super().close()
        self.front.close()
        self.front.close()
        self.memory.close()

    def send(self, number: int, data: bytes) -> None:
        """Add a buffer with ``data`` and one for its answer, and notify as KVM does."""
        ring = self.rings[number]
        at = 2 * ring.added % ring.size
        place = ring.buffers + 0x800 * at
        self.memory.write(place, data)
        ring.describe(at, place, len(data), NEXT, at + 1)
        ring.describe(at + 1, place + 0x400, 0x400, WRITE)
        ring.offer(at)
        os.eventfd_write(self.kvm.ioeventfds[self.notifications + 4 * number, 2], 1)

    def answers(self, number: int) -> list[bytes]:
        """What the daemon has returned since the last call."""
        ring, found = self.rings[number], []
        (index,) = struct.unpack("<H", self.memory.read(ring.used + 2, 2))
        while ring.seen != index:
            head, written = struct.unpack("<II", self.memory.read(ring.used + 4 + 8 * (ring.seen % ring.size), 8))
            found.append(self.memory.read(ring.buffers + 0x800 * head + 0x400, written))
            ring.seen = (ring.seen + 1) & 0xFFFF
        return found

    def asked(self, number: int, data: bytes) -> bytes:
        self.send(number, data)
        found: list[bytes] = []
        until(lambda: bool(found.extend(self.answers(number)) or found))
        return found[0]

    def hurry(self, how: str = "silent") -> None:
        """Wait briefly for the answer of a daemon that does not give it."""
        if how in SILENT:
            self.front._connection.seconds = 0.3

    def given(self) -> None:
        """Wait until the daemon has the rings."""
        until(lambda: bool(self.daemon.rings) and all(ring.enabled for ring in self.daemon.rings.values()))

    def lost(self) -> str:
        """Why the daemon is gone; the driver was told to reset the device."""
        until(lambda: bool(self.reasons))
        assert self.status & (DRIVER_OK | NEEDS_RESET) in (0, DRIVER_OK | NEEDS_RESET)
        assert len(self.reasons) == 1
        return self.reasons[0]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


@contextmanager
def serving(daemon: Daemon) -> Iterator[Guest]:
    with daemon:
        guest = Guest(daemon)
        try:
            yield guest
        finally:
            guest.close()
