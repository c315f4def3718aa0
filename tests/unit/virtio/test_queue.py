"""Rings that a driver may and may not make."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from support.virtio_driver import INDIRECT, NEXT, WRITE, Driver

from kvmpass.layout import MIB
from kvmpass.memory import Backing, GuestMemory
from kvmpass.virtio.device import VERSION_1
from kvmpass.virtio.queue import MAX_CHAIN_BYTES, Chain, RingError, Virtqueue
from kvmpass.virtio.transport import NEEDS_RESET

_READS, _END = 1000, 1001  # places behind the used ring, for the test's own signs
FREE = 0x200000  # memory that the rings do not use


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    driver.start()
    driver.open_ports()
    yield driver
    driver.close()
    driver.memory.close()


def refused(driver: Driver) -> bool:
    """Whether the device asks for a reset when it is notified of the first port's queue; nothing has arrived."""
    driver.notify(1)
    assert driver.said["one"] == b""
    return bool(driver.status & NEEDS_RESET)


def test_a_driver_sees_no_index_but_the_old_and_the_new() -> None:
    """Another process reads it while chains are returned: it never goes back, to zero in between for instance."""
    memory = GuestMemory()
    region = memory.add_ram(0, 4 * MIB, backing=Backing.MEMFD)
    queue = Virtqueue(memory, 8, lambda vector: None)
    queue.descriptors, queue.available, queue.used = 0, 0x1000, 0x2000
    queue.enable()
    chain = Chain(memory, 0)
    queue.push(chain, 0)
    shared = mmap.mmap(region.file, 0x3000)  # guest memory itself is not inherited
    index = memoryview(shared)[0x2000:].cast("H")
    child = os.fork()
    if child == 0:
        index[_READS] = 1
        before = back = 0
        while index[_END] == 0:
            back += (now := index[1]) < before
            before = now
        os._exit(min(back, 1))
    while index[_READS] == 0:
        time.sleep(0.001)
    for _ in range(60_000):
        queue.push(chain, 0)
    index[_END] = 1
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    index.release()
    memory.close()


def test_rings_may_reach_the_end_of_memory_and_not_beyond() -> None:
    """Sizes of a split queue's parts: Virtual I/O Device 1.2, section 2.7."""
    memory = GuestMemory()
    memory.add_ram(0, MIB)
    sizes = {"descriptors": 16 * 8, "available": 6 + 2 * 8, "used": 6 + 8 * 8}
    steps = {"descriptors": 16, "available": 2, "used": 4}
    for part, size in sizes.items():
        last = (MIB - size) // steps[part] * steps[part]
        for address, fits in ((last, True), (last + steps[part], False)):
            queue = Virtqueue(memory, 8, lambda vector: None)
            queue.descriptors, queue.available, queue.used = 0, 0x1000, 0x2000
            setattr(queue, part, address)
            with nullcontext() if fits else pytest.raises(RingError):
                queue.enable()
    memory.close()


def test_a_new_queue_is_notified_until_it_asks_not_to_be() -> None:
    memory = GuestMemory()
    memory.add_ram(0, MIB)
    queue = Virtqueue(memory, 8, lambda vector: None)
    queue.descriptors, queue.available, queue.used = 0, 0x1000, 0x2000
    queue.enable()
    for wanted in (False, True):
        queue.want_notifications(wanted)
        assert memory.read(queue.used, 2) == struct.pack("<H", not wanted)
    queue.want_notifications(False)
    queue.reset()
    queue.used, queue.available = 0x3000, 0x1000
    queue.enable()
    queue.want_notifications(False)
    assert memory.read(0x3000, 2) == b"\1\0"
    memory.close()


def table(*descriptors: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors)


def test_a_chain_is_read_in_its_order(driver: Driver) -> None:
    ring = driver.rings[1]
    driver.memory.write(FREE, b"abcdef")
    ring.describe(5, FREE + 3, 3, NEXT, 2)
    ring.describe(2, FREE, 2, NEXT, 9)
    ring.describe(9, FREE + 2, 1)
    ring.offer(5)
    driver.notify(1)
    assert driver.said["one"] == b"defabc"
    assert ring.returned() == [(5, b"")]


def test_an_indirect_table(driver: Driver) -> None:
    driver.memory.write(FREE, b"abcdef")
    driver.memory.write(FREE + 64, table((FREE + 2, 2, NEXT, 2), (0, 0, 0, 0), (FREE, 2, 0, 0)))
    driver.rings[1].describe(0, FREE + 64, 48, INDIRECT)
    driver.rings[1].offer(0)
    driver.notify(1)
    assert driver.said["one"] == b"cdab"


def test_indexes_wrap(driver: Driver) -> None:
    ring = driver.rings[1]
    for number in range(70_000 // ring.size):
        for at in range(ring.size):
            ring.send(bytes([number + at & 0xFF]))
        driver.notify(1)
        assert len(ring.returned()) == ring.size
    assert len(driver.said["one"]) == 70_000 // ring.size * ring.size


def test_more_entries_than_there_are(driver: Driver) -> None:
    driver.memory.write(driver.rings[1].available + 2, struct.pack("<H", driver.rings[1].size + 1))
    assert refused(driver)


@pytest.mark.parametrize(
    "chain",
    [
        [(FREE, 1, NEXT, 0)],
        [(FREE, 1, NEXT, 1), (FREE, 1, NEXT, 0)],
        [(FREE, 1, NEXT, 32)],
        [(FREE, 1, WRITE | NEXT, 1), (FREE, 1, 0, 0)],
        [(4 * MIB - 1, 2, 0, 0)],
        [(1 << 63, 1, 0, 0)],
        [((1 << 64) - 1, 2, 0, 0)],
        [(0xC000_0000, 4, 0, 0)],
        [(0, MAX_CHAIN_BYTES, NEXT, 1), (0, 1, 0, 0)],
        [(0, 0xFFFF_FFFF, 0, 0)],
        [(FREE, 16, INDIRECT | NEXT, 1), (FREE, 1, 0, 0)],
        [(FREE, 0, INDIRECT, 0)],
        [(FREE, 17, INDIRECT, 0)],
        [(FREE, 33 * 16, INDIRECT, 0)],
        [(4 * MIB - 8, 16, INDIRECT, 0)],
    ],
    ids=[
        "itself",
        "loop",
        "beyond the table",
        "read after write",
        "end of RAM",
        "far outside",
        "wraps around",
        "in a BAR",
        "too long",
        "4 GiB",
        "indirect and next",
        "empty table",
        "odd table",
        "large table",
        "table outside",
    ],
)
def test_a_chain_that_may_not_be(driver: Driver, chain: list[tuple[int, int, int, int]]) -> None:
    for at, descriptor in enumerate(chain):
        driver.rings[1].describe(at, *descriptor)
    driver.rings[1].offer(0)
    assert refused(driver)


@pytest.mark.parametrize(
    "inner",
    [
        table(*((FREE, 1, NEXT, at + 1) for at in range(15))),
        table((FREE, 16, INDIRECT, 0)),
        table((FREE, 1, NEXT, 0)),
        table((FREE, 1, NEXT, 1)),
        table((FREE, 1, NEXT, 1), (FREE, 1, NEXT, 0)),
    ],
    ids=["beyond fifteen entries", "nested", "itself", "beyond the table", "loop"],
)
def test_an_indirect_table_that_may_not_be(driver: Driver, inner: bytes) -> None:
    driver.memory.write(FREE + 64, inner)
    driver.rings[1].describe(0, FREE + 64, len(inner), INDIRECT)
    driver.rings[1].offer(0)
    assert refused(driver)


def test_indirect_tables_must_be_negotiated() -> None:
    driver = Driver()
    driver.start(VERSION_1 | 2)
    driver.open_ports()
    driver.memory.write(FREE + 64, table((FREE, 1, 0, 0)))
    driver.rings[1].describe(0, FREE + 64, 16, INDIRECT)
    driver.rings[1].offer(0)
    assert refused(driver)
    driver.close()
    driver.memory.close()


def test_the_device_does_not_write_rom(driver: Driver) -> None:
    ring = driver.rings[0]
    ring.describe(0, 8 * MIB, 16, WRITE)
    ring.offer(0)
    driver.host["one"].send(b"xyz")
    assert driver.memory.read(8 * MIB, 3) == b"rom"
    assert driver.status & NEEDS_RESET


def test_a_buffer_across_two_regions(driver: Driver) -> None:
    region = driver.memory.add_ram(4 * MIB, 4 * MIB)
    driver.memory.write(4 * MIB - 2, b"ab")
    driver.memory.write(4 * MIB, b"cd")
    driver.rings[1].describe(0, 4 * MIB - 2, 4)
    driver.rings[1].offer(0)
    driver.notify(1)
    assert driver.said["one"] == b"abcd"
    driver.memory.remove(region)


def test_input_goes_into_chains_of_any_shape(driver: Driver) -> None:
    """One after the other, as far as it goes: what is left over stays with the driver."""
    ring = driver.rings[0]
    ring.describe(0, FREE, 3, WRITE | NEXT, 1)
    ring.describe(1, FREE + 10, 4, WRITE)
    ring.describe(2, FREE + 20, 0, WRITE)
    ring.describe(3, FREE + 30, 5, WRITE)
    driver.memory.write(FREE + 256, table((FREE + 40, 2, WRITE | NEXT, 1), (FREE + 50, 6, WRITE, 0)))
    ring.describe(4, FREE + 256, 32, INDIRECT)
    ring.describe(5, FREE + 60, 5, WRITE)
    ring.describe(6, FREE + 70, 5)
    for head in (6, 0, 2, 3, 4, 5):
        ring.offer(head)
    driver.host["one"].send(b"abcdefghijklmnop")
    parts = {at: driver.memory.read(FREE + at, 6).rstrip(b"\0") for at in (0, 10, 20, 30, 40, 50, 60, 70)}
    assert parts == {0: b"abc", 10: b"defg", 20: b"", 30: b"hijkl", 40: b"mn", 50: b"op", 60: b"", 70: b""}
    used = struct.unpack("<10I", driver.memory.read(ring.used + 4, 40))
    assert used == (6, 0, 0, 7, 2, 0, 3, 5, 4, 4)
    assert driver.memory.read(ring.used + 2, 2) == b"\5\0", "the last one was not needed"
    driver.host["one"].send(b"next")
    assert driver.memory.read(FREE + 60, 5) == b"next\0"


@pytest.mark.parametrize("length", [MAX_CHAIN_BYTES + 1, 0xFFFF_FFFF])
def test_a_buffer_for_input_that_may_not_be(driver: Driver, length: int) -> None:
    driver.rings[0].describe(0, 0, length, WRITE)
    driver.rings[0].offer(0)
    driver.host["one"].send(b"x")
    assert driver.status & NEEDS_RESET
    assert driver.host["one"].waiting == 1


def test_a_buffer_for_input_beyond_the_table(driver: Driver) -> None:
    driver.rings[0].offer(driver.rings[0].size)
    driver.host["one"].send(b"x")
    assert driver.status & NEEDS_RESET
