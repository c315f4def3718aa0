"""Named ports: how the driver finds them, both directions, resets."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.virtio_driver import BASIC, Driver

from kvmpass import pciregs
from kvmpass.host.limits import CONSOLE_DESCRIPTORS
from kvmpass.machine.functions import Functions
from kvmpass.machine.vcpus import GuestOutcome, VcpuThreads
from kvmpass.virtio.console import ADD, NAME, OPEN, PORT_READY, READY


def test_its_descriptors_are_those_of_a_plan() -> None:
    """With the one port that a guest's agent has, and both vectors."""

    def opened() -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    before = opened()
    driver = Driver(["agent"], doorbells=True)
    driver.start()
    assert opened() - before == CONSOLE_DESCRIPTORS
    driver.close()
    assert opened() == before


@pytest.fixture(params=[False, True], ids=["exits", "doorbells"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = Driver(doorbells=request.param)
    driver.start()
    yield driver
    driver.close()
    driver.memory.close()


def test_the_configuration_says_how_many(driver: Driver) -> None:
    assert struct.unpack("<HHII", driver.mmio.read(driver.device, 8) + driver.mmio.read(driver.device + 8, 4)) == (
        0,
        0,
        2,
        0,
    )
    assert driver.read(18, 2) == 6


def test_ports_are_added_and_named(driver: Driver) -> None:
    for _ in range(driver.rings[2].size):
        driver.rings[2].receive()
    driver.tell(0, READY, 1)
    assert driver.told() == [(0, ADD, 0, b""), (1, ADD, 0, b"")]
    driver.tell(1, PORT_READY, 1)
    assert driver.told() == [(1, NAME, 1, b"two"), (1, OPEN, 1, b"")]


def test_messages_wait_for_buffers_and_do_not_grow(driver: Driver) -> None:
    """A driver may repeat its requests without a buffer for the answers."""
    for _ in range(1000):
        driver.tell(0, READY, 1)
        driver.tell(1, PORT_READY, 1)
        driver.tell(99, PORT_READY, 1)
        driver.rings[3].returned()
    assert len(driver.console._messages) == 4
    for _ in range(4):
        driver.rings[2].receive()
    driver.notify(2)
    assert {(port, event) for port, event, _, _ in driver.told()} == {(0, ADD), (1, ADD), (1, NAME), (1, OPEN)}


@pytest.mark.parametrize("message", [b"", b"\0" * 7, b"\0" * 4096], ids=["empty", "short", "long"])
def test_other_messages_are_ignored(driver: Driver, message: bytes) -> None:
    driver.rings[3].send(message[:0x800])
    driver.notify(3)
    assert len(driver.rings[3].returned()) == 1
    assert driver.status == 0xF


def test_output_arrives_whole(driver: Driver) -> None:
    driver.open_ports()
    for text in (b"first,", b"second,", b"third"):
        driver.rings[5].send(text)
    driver.notify(5)
    assert (driver.said["two"], driver.said["one"]) == (b"first,second,third", b"")
    assert [written for _, written in driver.rings[5].returned()] == [b""] * 3


def test_the_end_of_a_guest_is_known_after_its_output(driver: Driver) -> None:
    """The thread that serves the queues may not have run since: here it is not even notified."""
    machine = Functions(1)
    machine._ports = driver.host
    ended = SimpleNamespace(wait=lambda timeout: None if timeout == 0 else GuestOutcome.PANIC)
    machine._threads = cast(VcpuThreads, ended)
    assert machine.wait() is GuestOutcome.PANIC, "without a driver"
    driver.open_ports()
    driver.rings[5].send(b"last words")
    assert machine.wait(0) is None
    assert driver.said["two"] == b""
    assert machine.wait() is GuestOutcome.PANIC
    assert driver.said["two"] == b"last words"
    assert [written for _, written in driver.rings[5].returned()] == [b""]
    driver.write(20, 0, 1)  # device_status
    assert machine.wait() is GuestOutcome.PANIC


def test_what_cannot_be_read_yet_stays_in_the_guest(driver: Driver) -> None:
    """While the function may not access memory."""
    driver.open_ports()
    driver.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY)
    driver.rings[1].send(b"kept")
    driver.notify(1)
    assert driver.said["one"] == b""
    driver.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
    assert driver.said["one"] == b"kept"


def test_input_waits_for_buffers(driver: Driver) -> None:
    """Notifications are asked for only while something waits."""
    driver.host["one"].send(b"before the driver, ")
    driver.open_ports()
    ring = driver.rings[0]
    for _ in range(2):
        ring.receive(8)
    driver.notify(0)
    assert [data for _, data in ring.returned()] == [b"before t", b"he drive"]
    assert ring.wants_notifications
    assert driver.host["one"].send(b"after") == len(b"r, after")
    ring.receive(64)
    driver.notify(0)
    assert [data for _, data in ring.returned()] == [b"r, after"]
    assert not ring.wants_notifications
    assert driver.host["one"].waiting == 0
    ring.receive(64)
    driver.host["one"].send(b"at once")
    assert [data for _, data in ring.returned()] == [b"at once"]


def test_a_buffer_without_room_takes_nothing(driver: Driver) -> None:
    driver.open_ports()
    driver.rings[0].receive(0)
    driver.host["one"].send(b"x")
    assert driver.rings[0].returned() == [(0, b"")]
    assert driver.host["one"].waiting == 1


def test_the_end_comes_after_the_input(driver: Driver) -> None:
    driver.open_ports()
    driver.told()
    for _ in range(2):
        driver.rings[2].receive()
    driver.host["one"].send(b"last")
    driver.host["one"].end()
    assert driver.told() == []
    driver.rings[0].receive()
    driver.notify(0)
    assert driver.told() == [(0, OPEN, 0, b"")]
    driver.host["one"].end()
    assert driver.told() == [], "once"


def test_without_several_ports_there_is_no_output(driver: Driver) -> None:
    driver.start(BASIC)
    driver.rings[1].send(b"x")
    driver.notify(1)
    driver.host["one"].send(b"y")
    assert (driver.said["one"], len(driver.rings[1].returned()), driver.status) == (b"", 1, 0xF)


def test_the_host_learns_that_a_program_has_opened_or_closed_its_port(driver: Driver) -> None:
    """Of the close once, however often the guest says so, and not of a port that was not open."""
    opened: list[str] = []
    closed: list[str] = []
    for port in driver.host.values():
        port.on_open, port.on_close = partial(opened.append, port.name), partial(closed.append, port.name)
    driver.start()
    driver.tell(0, OPEN, 0)
    driver.open_ports()
    assert (opened, closed) == (["one", "two"], [])
    driver.tell(1, OPEN, 0)
    driver.tell(1, OPEN, 0)
    assert (opened, closed) == (["one", "two"], ["two"])
    driver.tell(1, OPEN, 1)
    assert opened == ["one", "two", "two"]
    driver.tell(1, OPEN, 0)
    assert closed == ["two", "two"]


def test_a_driver_starts_again(driver: Driver) -> None:
    """The ring's state is reset; what waits for the guest does not get lost."""
    driver.open_ports()
    driver.rings[1].send(b"a")
    driver.notify(1)
    driver.host["one"].send(b"kept")
    driver.start()
    driver.open_ports()
    driver.rings[1].send(b"b")
    driver.notify(1)
    driver.rings[0].receive()
    driver.notify(0)
    assert driver.said["one"] == b"ab"
    assert driver.rings[0].returned() == [(0, b"kept")]


def test_what_was_written_before_a_reset_arrives(driver: Driver) -> None:
    """A guest that powers off resets the device: maybe before its last notification was served."""
    driver.open_ports()
    driver.rings[1].send(b"last words")
    driver.write(20, 0, 1)
    assert driver.said["one"] == b"last words"


def test_a_machine_starts_again() -> None:
    """Its reset makes the new function first, and closes the old one after it."""
    driver = Driver()
    driver.start()
    driver.open_ports()
    old, rings = driver.function, driver.rings
    driver.pci.unplug(old)
    driver.make()
    old.close()
    rings[1].send(b"into the old one")
    driver.start()
    driver.open_ports()
    driver.rings[1].send(b"new")
    driver.notify(1)
    driver.host["one"].send(b"in")
    driver.rings[0].receive()
    driver.notify(0)
    assert (driver.said["one"], driver.rings[0].returned()) == (b"new", [(0, b"in")])
    driver.close()
    driver.memory.close()
    assert driver.host["one"].send(b"to nobody") == 9
