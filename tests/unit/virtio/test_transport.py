"""The modern PCI transport, as a driver meets it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from support.virtio_driver import MESSAGES, Driver

from kvmpass import pciregs
from kvmpass.layout import PAGE
from kvmpass.virtio.console import MODALIAS, MULTIPORT
from kvmpass.virtio.device import INDIRECT, VERSION_1
from kvmpass.virtio.function import BAR_SIZE, COMMON, NOTIFY
from kvmpass.virtio.transport import DRIVER_OK, FEATURES_OK, NEEDS_RESET, NO_VECTOR


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()
    driver.memory.close()


def test_it_is_what_its_modalias_says(driver: Driver) -> None:
    identity, subsystem, kind = driver.config(0), driver.config(0x2C), driver.config(8)
    vendor, device = identity & 0xFFFF, identity >> 16
    words = f"pci:v{vendor:08X}d{device:08X}sv{subsystem & 0xFFFF:08X}sd{subsystem >> 16:08X}"
    words += f"bc{kind >> 24:02X}sc{kind >> 16 & 0xFF:02X}i{kind >> 8 & 0xFF:02X}"
    assert words == MODALIAS
    assert driver.config(pciregs.BAR0, value=0xFFFF_FFFF) == -BAR_SIZE & 0xFFFF_FFFF
    driver.config(pciregs.BAR0, value=driver.bar)


def test_structures_are_inside_the_bar_and_apart(driver: Driver) -> None:
    found = []
    for capability in pciregs.capabilities(lambda offset, size: driver.config(offset, size)):
        if capability.id == pciregs.CAP_VENDOR and driver.config(capability.offset + 3, 1) != 5:
            assert driver.config(capability.offset + 4, 1) == 0
            found.append((driver.config(capability.offset + 8), driver.config(capability.offset + 12)))
    assert len(found) == 4
    ordered = sorted(found)
    assert all(start + size <= following for (start, size), (following, _) in pairwise(ordered))
    assert ordered[-1][0] + ordered[-1][1] <= 4 * PAGE, "the table of MSI-X comes after them"


def test_kvm_collects_what_has_no_effect_by_itself(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    written: set[int] = set()
    write = driver.write
    monkeypatch.setattr(driver, "write", lambda at, value, size: (written.add(at), write(at, value, size)))
    driver.start()
    zones = [(start - driver.common, size) for start, size in driver.kvm.coalescing]
    exits = {at for at in written if not any(start <= at < start + size for start, size in zones)}
    assert exits == {20, 28}, "device_status, queue_enable"
    assert {0, 8, 12, 16, 22, 26, 32, 36, 40, 44, 48, 52} <= written
    driver.config(pciregs.COMMAND, 2, 0)
    assert not driver.kvm.coalescing


def test_negotiation(driver: Driver) -> None:
    """Version 1 is a must, and nothing that was not offered."""
    driver.enable()
    assert driver.features == VERSION_1 | INDIRECT | MULTIPORT
    assert not driver.negotiate(MULTIPORT)
    assert not driver.negotiate(VERSION_1 | 1 << 35)
    assert driver.negotiate(VERSION_1)
    driver.write(8, 0, 4)
    driver.write(12, MULTIPORT, 4)
    assert driver.read(12, 4) == 0, "they are fixed now"
    driver.write(0, 7, 4)
    assert driver.read(4, 4) == 0
    driver.write(20, 0, 1)
    assert driver.status == 0


def test_what_the_driver_accepts_is_read_back(driver: Driver) -> None:
    """32 bits at a time; beyond 64 there are none."""
    driver.enable()
    for half, value in ((0, 0x8000_0001), (1, 0x7000_0002), (0, 0x1234_5678), (2, 0xFFFF_FFFF)):
        driver.write(8, half, 4)
        driver.write(12, value, 4)
    found = []
    for half in (0, 1, 2, 3, 0xFFFF_FFFF):
        driver.write(8, half, 4)
        found.append(driver.read(12, 4))
    assert found == [0x1234_5678, 0x7000_0002, 0, 0, 0]


@pytest.mark.parametrize("offset", [32, 40, 48], ids=["descriptors", "available", "used"])
def test_addresses_of_a_queue(driver: Driver, offset: int) -> None:
    """Whole or in halves, each of which leaves the other; nothing else is written."""
    driver.enable()
    others = [at for at in (32, 40, 48) if at != offset]
    driver.write(offset, 0x1122_3344_5566_7780, 8)
    assert driver.read(offset, 8) == 0x1122_3344_5566_7780
    driver.write(offset, 0xAABB_CC00, 4)
    assert driver.read(offset, 8) == 0x1122_3344_AABB_CC00
    driver.write(offset + 4, 0xDEAD_BEEF, 4)
    assert driver.read(offset, 8) == 0xDEAD_BEEF_AABB_CC00
    for at, size in ((0, 1), (0, 2), (2, 2), (2, 4), (4, 8), (6, 2), (1, 4)):
        driver.write(offset + at, 0, size)
    assert driver.read(offset, 8) == 0xDEAD_BEEF_AABB_CC00
    assert [driver.read(at, 8) for at in others] == [0, 0]
    driver.write(22, 0xFFFF, 2)
    assert driver.read(offset, 8) == 0, "of a queue that does not exist"


def test_the_driver_is_not_ready_without_features(driver: Driver) -> None:
    driver.enable()
    driver.write(20, DRIVER_OK, 1)
    assert driver.status == 0


def test_status_bits_are_not_cleared_but_by_a_reset(driver: Driver) -> None:
    driver.start()
    driver.write(20, FEATURES_OK, 1)
    assert driver.status == 0xF
    driver.write(20, 0, 1)
    assert driver.status == 0
    for number in range(driver.read(18, 2)):
        driver.write(22, number, 2)
        assert (driver.read(28, 2), driver.read(26, 2), driver.read(32, 8)) == (0, NO_VECTOR, 0)


def test_an_absent_queue(driver: Driver) -> None:
    driver.enable()
    driver.write(22, driver.read(18, 2), 2)
    assert (driver.read(24, 2), driver.read(28, 2)) == (0, 0)
    driver.write(24, 4, 2)
    driver.write(28, 1, 2)
    driver.notify(6)
    assert driver.status == 0


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(24, 2, 0), (24, 2, 3), (24, 2, 128), (32, 8, 8), (40, 8, 1), (48, 8, 2), (32, 8, 4 << 20), (48, 8, 8 << 20)],
    ids=["no entry", "no power of two", "too many", "table", "available", "used", "outside of RAM", "used in ROM"],
)
def test_a_queue_that_cannot_be(driver: Driver, offset: int, size: int, value: int) -> None:
    driver.enable()
    driver.negotiate()
    driver.add_queue(0, enable=False)
    driver.write(offset, value, size)
    driver.write(28, 1, 2)
    assert driver.read(28, 2) == 0
    assert driver.status & NEEDS_RESET
    driver.ready()
    driver.notify(0)
    driver.write(20, 0, 1)
    assert driver.negotiate(), "and it works again"


def test_an_enabled_queue_is_fixed(driver: Driver) -> None:
    driver.start()
    driver.write(22, 1, 2)
    before = driver.read(24, 2), driver.read(32, 8)
    driver.write(24, 2, 2)
    driver.write(32, 0x1234, 4)
    assert (driver.read(24, 2), driver.read(32, 8)) == before
    driver.write(26, 0, 2)
    assert driver.read(26, 2) == 0
    driver.write(26, 2, 2)
    assert driver.read(26, 2) == NO_VECTOR, "there are two vectors"


def test_access_through_configuration_space(driver: Driver) -> None:
    """Without a BAR that decodes."""
    driver.enable(pciregs.COMMAND_MASTER)
    at = driver.window
    for offset, value in ((8, COMMON + 22), (12, 2)):
        driver.config(at + offset, value=value)
    driver.config(at + 16, value=3)
    assert driver.function.transport.read(22, 2) == b"\3\0"
    driver.config(at + 8, value=COMMON + 18)
    assert driver.config(at + 16) & 0xFFFF == 6
    for bar, offset, length in ((1, COMMON, 4), (0, COMMON, 3), (0, 1, 4), (0, BAR_SIZE, 4), (0, NOTIFY, 0)):
        driver.config(at + 4, 1, bar)
        driver.config(at + 8, value=offset)
        driver.config(at + 12, value=length)
        driver.config(at + 16, value=0x55)
        assert driver.config(at + 16) == 0x55, "nothing is accessed"


def test_nothing_happens_while_the_function_may_not_access_memory(driver: Driver) -> None:
    driver.start()
    driver.open_ports()
    driver.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY)
    driver.rings[1].send(b"early")
    driver.notify(1)
    assert driver.said["one"] == b""
    driver.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
    assert driver.said["one"] == b"early"


def test_interrupts(driver: Driver) -> None:
    """One for used buffers, unless the driver has turned them off; one for the need of a reset."""
    driver.start()
    driver.open_ports()
    driver.interrupts()
    driver.mmio.read(driver.isr, 1)
    driver.rings[1].send(b"x")
    driver.notify(1)
    assert driver.interrupts() == [MESSAGES[1][1]]
    assert [driver.mmio.read(driver.isr, 1)[0] for _ in range(2)] == [1, 0]
    driver.memory.write(driver.rings[1].available, b"\1\0")
    driver.rings[1].send(b"y")
    driver.notify(1)
    assert driver.interrupts() == []
    driver.rings[1].offer(200)
    driver.notify(1)
    assert driver.interrupts() == [MESSAGES[0][1]]
    assert driver.mmio.read(driver.isr, 1)[0] == 2
    assert driver.status & NEEDS_RESET
    assert driver.said["one"] == b"xy"


def test_memory_that_is_removed_is_not_accessed(driver: Driver) -> None:
    region = driver.memory.add_ram(16 << 20, 1 << 20)
    driver.start()
    driver.open_ports()
    driver.memory.write(16 << 20, b"there")
    driver.rings[1].describe(0, 16 << 20, 5)
    driver.rings[1].offer(0)
    driver.notify(1)
    driver.memory.remove(region)
    driver.rings[1].offer(0)
    driver.notify(1)
    assert driver.said["one"] == b"there"
    assert driver.status & NEEDS_RESET
