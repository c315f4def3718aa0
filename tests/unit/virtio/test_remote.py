"""A device that a daemon serves: by the rules, and rude daemons. The daemon is a thread of this process."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.vhost_daemon import Daemon
from support.virtio_driver import MESSAGES, NEXT, WRITE, Driver

from kvmpass.memory import Backing
from kvmpass.virtio.device import VERSION_1
from kvmpass.virtio.frontend import FrontEnd
from kvmpass.virtio.remote import RemoteDevice
from kvmpass.virtio.transport import DRIVER_OK, NEEDS_RESET
from kvmpass.virtio.vhost_user import CONFIGURE_MEM_SLOTS, REPLY_ACK

QUEUES = (16, 32, 16)
FREE = 0x200000


class Guest(Driver):
    """A driver of a function whose queues ``daemon`` serves."""

    def __init__(self, daemon: Daemon, *, seconds: float = 10.0) -> None:
        self.daemon, self.seconds = daemon, seconds
        self.reasons: list[str] = []
        super().__init__(doorbells=True, backing=Backing.MEMFD)

    def make(self) -> None:
        if not hasattr(self, "front"):
            self.front = FrontEnd("it", self.daemon.front, self.memory, self.reasons.append)
            self.front._connection.seconds = self.seconds
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
def serving(daemon: Daemon, **options: float) -> Iterator[Guest]:
    with daemon:
        guest = Guest(daemon, **options)
        try:
            yield guest
        finally:
            guest.close()


KINDS = {
    "newest": {},
    "table": {"protocol": REPLY_ACK},
    "without acknowledgments": {"protocol": CONFIGURE_MEM_SLOTS},
    "oldest": {"features": VERSION_1},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_requests_and_answers(options: dict[str, int]) -> None:
    with serving(Daemon(**options)) as guest:
        guest.start(vectors=(1, 2, 3))
        assert guest.asked(0, b"hello") == b"HELLO"
        assert [guest.asked(1, bytes([65 + n % 26])) for n in range(40)] == [bytes([65 + n % 26]) for n in range(40)]
        arrived: set[int] = set()
        until(lambda: bool(arrived.update(guest.interrupts())) or len(arrived) == 2)
        assert arrived == {MESSAGES[1][1], MESSAGES[2][1]}
        guest.front.audit()
        guest.write(20, 0, 1)
        until(lambda: guest.status == 0)
        assert guest.daemon.rings == {}, "they are the driver's again"
        guest.start(vectors=(1, 1, 1))
        assert guest.asked(2, b"again") == b"AGAIN"
        assert guest.status == 0xF
        assert guest.reasons == []
