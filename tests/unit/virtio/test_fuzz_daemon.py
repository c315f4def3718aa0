"""What rude daemons may answer to a front end whose guest does anything: random, seeded, checked as they go.

Messages of the daemon are changed at random, while the driver starts and resets, memory comes and goes, interrupts
are turned off and on, the function loses the bus or is made again. ``KVMPASS_SOAK=1`` makes a hundred times as many.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.vhost_daemon import FEATURES, OTHERS, PROTOCOL, RUDENESS, Daemon
from support.virtio_driver import Driver

from kvmpass import pciregs
from kvmpass.errors import DaemonError, LayoutError
from kvmpass.layout import MIB
from kvmpass.memory import Backing
from kvmpass.virtio.frontend import FrontEnd
from kvmpass.virtio.remote import RemoteDevice
from kvmpass.virtio.transport import DRIVER_OK, NEEDS_RESET
from kvmpass.virtio.vhost_user import Request

SOAK = os.environ.get("KVMPASS_SOAK") == "1"
LIVES = 6000 if SOAK else 60
SEEDS = range(2)
SECONDS = 0.05
EXTRA_AT = 16 * MIB


class Mood(dict[Request, str]):
    """How a daemon treats a request: mostly well."""

    def __init__(self, seed: int, rate: float) -> None:
        super().__init__()
        self._random, self._rate = random.Random(seed), rate

    def get(self, request: Request, default: str = "") -> str:  # type: ignore[override]
        if self._random.random() >= self._rate:
            return default
        return self._random.choice((*RUDENESS, *OTHERS, "any value", "any value"))


class Guest(Driver):
    """A driver that does anything to a function whose queues a daemon serves."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.reasons: list[str] = []
        kinds = ({}, {"protocol": 0}, {"protocol": PROTOCOL & ~8}, {"features": FEATURES & ~(1 << 30)})
        self.rate = self.random.choice((0.0, 0.01, 0.1))
        self.daemon = Daemon(rude=Mood(seed, self.rate), **self.random.choice(kinds))
        super().__init__((), doorbells=True, backing=Backing.MEMFD)

    def make(self) -> None:
        if not hasattr(self, "front"):
            connection, heard = self.daemon.front, self.reasons.append
            self.front = FrontEnd("it", connection, self.memory, heard, seconds=SECONDS)
        self.plug(RemoteDevice(self.front, device_type=2, class_code=0, features=0, queues=(16, 16), config=b""))

    def begin(self) -> None:
        self.enable()
        if self.negotiate():
            self.rings = [self.add_queue(number, vector=number) for number in range(2)]
            self.ready()

    def kick(self) -> None:
        for ring in self.rings:
            ring.send(b"something")
        for eventfd in self.kvm.ioeventfds.values():
            os.eventfd_write(eventfd, 1)

    def reset(self) -> None:
        self.write(20, 0, 1)
        end = time.monotonic() + 20
        while self.status:
            assert time.monotonic() < end, "its reset does not end"
            time.sleep(0.001)

    def change_memory(self) -> None:
        there = [region for region in self.memory if region.gpa == EXTRA_AT]
        if there:
            self.memory.remove(there[0])
        else:
            with suppress(LayoutError):  # the daemon's limit
                self.memory.add_ram(EXTRA_AT, MIB, backing=Backing.MEMFD)

    def switch_interrupts(self) -> None:
        found = pciregs.capabilities(lambda offset, size: self.config(offset, size))
        at = next(c.offset for c in found if c.id == pciregs.CAP_MSIX)
        self.config(at + 2, 2, self.random.choice((0, pciregs.MSIX_ENABLE)))
        self.write(22, self.random.randrange(3), 2)
        self.write(26, self.random.randrange(5), 2)

    def switch_access(self) -> None:
        master = self.random.choice((0, pciregs.COMMAND_MASTER))
        self.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | master)

    def make_again(self) -> None:
        old = self.function
        self.pci.unplug(old)
        self.make()
        old.close()
        self.begin()

    def shout(self) -> None:
        if not self.random.randrange(20):
            with suppress(OSError):
                self.daemon._socket.send(self.random.randbytes(self.random.randrange(1, 100)))

    def live(self, steps: int) -> None:
        actions: tuple[Callable[[], None], ...] = (
            *(self.kick, self.reset, self.change_memory, self.switch_interrupts, self.switch_access),
            *(self.make_again, self.shout, self.begin, self.begin),
        )
        self.begin()
        for _ in range(steps):
            started = time.monotonic()
            self.random.choice(actions)()
            assert time.monotonic() - started < 20
            assert len(self.front._loop._calls) < 30, "jobs of the front end: one for each function that was made"
            assert len(self.reasons) <= 1
            self.front.audit()
            if self.front.ended:
                self.begin()
                assert self.status & (DRIVER_OK | NEEDS_RESET) in (NEEDS_RESET | DRIVER_OK, DRIVER_OK, 0)

    def end(self) -> None:
        if hasattr(self, "function"):
            self.close()
            assert self.daemon.rings == {} or self.front.ended, "the daemon has rings of a function that is closed"
        if hasattr(self, "front"):
            self.front.close()
        self.memory.close()


def left() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@pytest.mark.parametrize("seed", SEEDS)
def test_rude_daemons(seed: int) -> None:
    """No exception, no hang, one report of an end, nothing left behind."""
    before = left()
    ends = lives = 0
    for life in range(LIVES // len(SEEDS)):
        guest = Guest.__new__(Guest)
        try:
            with suppress(DaemonError, LayoutError):
                guest.__init__(seed * 1_000_003 + life)  # type: ignore[misc]
                lives += 1
                guest.live(30)
                ends += len(guest.reasons)
        finally:
            guest.end()
            if guest.rate:  # it has got an answer to its own rubbish
                guest.daemon.error = None
            guest.daemon.__exit__()
        assert left() == before, f"life {life}"
    assert lives and ends, "the daemons are too polite"
    print(f"seed {seed}: {lives} connections, {ends} ended")
