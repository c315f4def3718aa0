"""What a hostile guest may do to a virtio function: random registers, rings and buffers, checked as they go.

Random, seeded, and aimed: most steps begin with rings that work, and then change a field of them. In between memory
comes and goes, the host sends, the function loses the bus. ``KVMPASS_SOAK=1`` makes ten million.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable

import pytest
from support.virtio_driver import INDIRECT, NEXT, WRITE, Driver

from kvmpass import pciregs
from kvmpass.layout import MIB
from kvmpass.virtio.function import BAR_SIZE
from kvmpass.virtio.queue import MAX_CHAIN_BYTES
from kvmpass.virtio.transport import DRIVER_OK, NEEDS_RESET

SOAK = os.environ.get("KVMPASS_SOAK") == "1"
STEPS = 10_000_000 if SOAK else 60_000
SEEDS = range(4)
ROM_AT, EXTRA_AT = 8 * MIB, 16 * MIB
WAITING = 4096  # bytes after which the host sends no more


class Guest:
    """A driver that sets up a console, and then does anything. Every choice comes from one random generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.driver = Driver(("one", "two", "three"))
        self.extra = self.driver.memory.add_ram(EXTRA_AT, MIB)
        self.here = True
        self.arrived = self.broken = self.given = 0
        self.begin()

    def begin(self) -> None:
        self.driver.config(pciregs.BAR0, value=self.driver.bar)
        self.driver.start()
        self.driver.open_ports()

    def number(self) -> int:
        return self.random.choice((0, 1, 2, 3, 7, 31, 32, 33, 0x7FFF, 0xFFFF, self.random.getrandbits(16)))

    def address(self) -> int:
        place = self.random.choice((0, 0x10000, 0x200000, 4 * MIB, ROM_AT, EXTRA_AT, 1 << 32, 1 << 63, 1 << 64))
        return (place + self.random.choice((0, 1, -1, 8, -16, 0x1000, self.random.getrandbits(12)))) % (1 << 64)

    def length(self) -> int:
        return self.random.choice((0, 1, 16, 48, 0x1000, MIB, MAX_CHAIN_BYTES + 1, 0xFFFF_FFFF, self.number()))

    # --- steps

    def access_the_bar(self) -> None:
        mmio, size = self.driver.mmio, self.random.choice((1, 2, 4, 8))
        at = self.random.choice((self.random.randrange(64), 0x3000 + self.random.randrange(64)))
        at = at if self.random.randrange(4) else self.random.randrange(BAR_SIZE - 8)
        if self.random.randrange(2):
            mmio.write(self.driver.bar + at, (self.number() % (1 << 8 * size)).to_bytes(size, "little"))
        else:
            assert len(mmio.read(self.driver.bar + at, size)) == size

    def access_configuration_space(self) -> None:
        at, size = self.random.choice((4, 0x10, 0x34, 0x84, 0x88, 0x8C, 0x90, 0x94, 0x98, 0x9A)), 4
        if self.random.randrange(2):
            self.driver.config(at, size, self.random.choice((self.number(), self.random.randrange(BAR_SIZE), 6)))
        self.driver.config(at, size)

    def change_a_ring(self) -> None:
        ring = self.random.choice(self.driver.rings)
        fields = (ring.available, ring.available + 2, ring.available + 4 + 2 * self.random.randrange(ring.size))
        self.driver.memory.write(self.random.choice(fields), struct.pack("<H", self.number() & 0xFFFF))

    def change_a_descriptor(self) -> None:
        ring = self.random.choice(self.driver.rings)
        flags = self.random.choice((0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, self.number()))
        following = self.random.choice((self.random.randrange(ring.size), self.number()))
        ring.describe(self.random.randrange(ring.size), self.address(), self.length(), flags, following)

    def write_an_indirect_table(self) -> None:
        ring = self.random.choice(self.driver.rings)
        count = self.random.choice((1, 2, 3, 33))
        kinds = (0, NEXT, WRITE, NEXT | WRITE, INDIRECT)
        data = b"".join(
            struct.pack("<QIHH", self.address(), self.length() % 64, self.random.choice(kinds), self.number() % 4)
            for _ in range(count)
        )
        self.driver.memory.write(0x200000, data)
        at = self.random.randrange(ring.size)
        ring.describe(at, 0x200000, 16 * count, INDIRECT)
        ring.offer(at)

    def offer(self) -> None:
        ring = self.random.choice(self.driver.rings)
        ring.offer(self.random.choice((self.random.randrange(ring.size), self.number())))

    def behave(self) -> None:
        number = self.random.randrange(len(self.driver.rings))
        ring = self.driver.rings[number]
        for _ in range(self.random.randrange(4)):
            if number % 2:
                message = struct.pack(
                    "<IHH", self.random.randrange(5), self.random.randrange(9), self.random.randrange(2)
                )
                ring.send(message)
            else:
                ring.receive(self.random.choice((0, 1, 8, 64, 0x800)))
        self.driver.notify(number)

    def notify(self) -> None:
        self.driver.notify(self.random.choice((*range(len(self.driver.rings)), self.number() % 1024)))

    def act_on_the_host(self) -> None:
        port = self.random.choice(list(self.driver.host.values()))
        if self.random.randrange(5):
            if port.waiting < WAITING:
                port.send(bytes(self.random.randrange(200)))
        else:
            port.end()
            port.reset()

    def change_memory(self) -> None:
        if self.here:
            self.driver.memory.remove(self.extra)
        else:
            self.extra = self.driver.memory.add_ram(EXTRA_AT, MIB)
        self.here = not self.here

    def start_again(self) -> None:
        self.broken += bool(self.driver.status & NEEDS_RESET)
        if not self.random.randrange(4):
            old = self.driver.function
            self.driver.pci.unplug(old)
            self.driver.make()
            old.close()
        self.begin()
        assert self.driver.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    def check(self) -> None:
        driver = self.driver
        assert driver.memory.read(ROM_AT, 3) == b"rom"
        assert len(driver.console._messages) <= 3 * 8
        for said in driver.said.values():
            self.arrived += len(said)
            said.clear()
        assert set(driver.kvm.irqfds) <= set(driver.kvm.routes)

    def run(self, count: int) -> None:
        steps: tuple[Callable[[], None], ...] = (
            *(self.access_the_bar, self.access_configuration_space, self.change_a_ring, self.change_a_descriptor),
            *(self.write_an_indirect_table, self.offer, self.notify, self.notify, self.act_on_the_host),
            *(self.behave,) * 6,
        )
        for number in range(count):
            self.random.choice(steps)()
            if number % 10 == 0:
                self.check()
            if not self.random.randrange(200):
                self.change_memory()
            if not self.random.randrange(20) and (self.driver.status & NEEDS_RESET or not self.random.randrange(8)):
                self.start_again()

    def close(self) -> None:
        self.driver.close()
        self.driver.memory.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hostile_driver(seed: int) -> None:
    """No exception, nothing written into ROM, nothing that grows, nothing left behind."""
    guest = Guest(seed)
    started = time.monotonic()
    guest.run(STEPS // len(SEEDS))
    assert guest.broken and guest.arrived, "the steps miss what they are aimed at"
    guest.close()
    print(f"seed {seed}: {guest.broken} broken, {guest.arrived} bytes in {time.monotonic() - started:.1f} s")
