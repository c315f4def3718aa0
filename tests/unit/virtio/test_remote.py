"""A device that a daemon serves: by the rules, and rude daemons. The daemon is a thread of this process."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
from support.remote_guest import QUEUES, SILENT, Guest, serving, until
from support.vhost_daemon import OTHERS, RUDENESS, Daemon
from support.virtio_driver import MESSAGES, NEXT, WRITE, Driver

from kvmpass import pciregs
from kvmpass.errors import DaemonError, GuestError, LayoutError
from kvmpass.layout import MIB, PAGE
from kvmpass.memory import Backing, HostMapping
from kvmpass.virtio.device import INDIRECT, VERSION_1
from kvmpass.virtio.frontend import FrontEnd
from kvmpass.virtio.transport import NEEDS_RESET
from kvmpass.virtio.vhost_user import CONFIGURE_MEM_SLOTS, PROTOCOL_FEATURES, REPLY_ACK, Request

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


# --- set-up and reset


def test_a_daemon_that_takes_its_time_delays_no_vcpu() -> None:
    """The driver goes on; what it has notified meanwhile is served. Its reset is over when the daemon says so."""
    with serving(Daemon()) as guest:
        guest.daemon.going.clear()
        guest.start()
        assert guest.status == 0xF
        guest.send(1, b"early")
        assert guest.answers(1) == []
        guest.daemon.going.set()
        until(lambda: guest.answers(1) == [b"EARLY"])
        guest.daemon.going.clear()
        guest.write(20, 0, 1)
        assert guest.status == 0xF
        guest.daemon.going.set()
        until(lambda: guest.status == 0)
        assert guest.daemon.rings == {}


def test_a_device_that_has_ended_is_not_set_up_again() -> None:
    """The guest has ejected it, but still reaches its BAR. Its close then waits for no daemon."""
    with serving(Daemon()) as guest:
        guest.start()
        guest.given()
        guest.function.quiesce()
        assert guest.daemon.rings == {}
        guest.enable()
        assert not guest.negotiate()
        guest.rings = [guest.add_queue(0)]
        guest.ready()
        assert guest.status == 0
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY)
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
        guest.send(0, b"nobody hears that")
        with guest.front.lock:  # as during a conversation
            closing = threading.Thread(target=guest.function.close, daemon=True)
            closing.start()
            closing.join(10)
            assert not closing.is_alive()
        assert guest.daemon.rings == {}


def test_a_driver_that_does_not_wait() -> None:
    """It resets and starts in a loop while the daemon does nothing: one job waits, not a thousand."""
    with serving(Daemon()) as guest:
        guest.daemon.going.clear()
        for _ in range(50):
            guest.start()
        assert len(guest.front._loop._calls) <= 1
        guest.daemon.going.set()
        assert guest.asked(0, b"x") == b"X"
        assert guest.daemon.requests.count(Request.GET_VRING_BASE) <= len(QUEUES)


def test_queues_that_the_driver_does_not_use() -> None:
    with serving(Daemon()) as guest:
        guest.enable()
        guest.negotiate()
        guest.rings = [guest.add_queue(0), guest.add_queue(1, enable=False), guest.add_queue(2)]
        guest.ready()
        assert guest.asked(2, b"two") == b"TWO"
        assert sorted(guest.daemon.rings) == [0, 2]
        guest.mmio.write(guest.notifications + 4, bytes(2))
        assert guest.status == 0xF


def test_a_notification_that_exits() -> None:
    """As KVM refuses the doorbells: it is passed on."""
    with serving(Daemon()) as guest:
        guest.start()
        guest.kvm.ioeventfds.clear()
        ring = guest.rings[0]
        guest.memory.write(ring.buffers, b"slow")
        ring.describe(0, ring.buffers, 4, NEXT, 1)
        ring.describe(1, ring.buffers + 0x400, 0x400, WRITE)
        ring.offer(0)
        guest.mmio.write(guest.notifications, bytes(2))
        until(lambda: guest.answers(0) == [b"SLOW"])
        guest.kvm.refusing = {"ioeventfd_deassign"}


def test_features() -> None:
    """Those of the type and of rings that the daemon has; no guest sees what belongs to vhost-user."""
    offered = VERSION_1 | INDIRECT | 1 << 29 | 1 << 34 | 1 << 35 | 1 << 26 | PROTOCOL_FEATURES | 3
    with serving(Daemon(features=offered)) as guest:
        guest.enable()
        assert guest.features == VERSION_1 | INDIRECT | 1 << 29 | 1
        guest.start(VERSION_1 | 1)
        assert guest.asked(0, b"x") == b"X"
        assert guest.daemon.accepted == VERSION_1 | PROTOCOL_FEATURES | 1
        assert guest.daemon.protocol == 1 << 0 | 1 << 3 | 1 << 9 | 1 << 15


def test_its_configuration() -> None:
    with serving(Daemon(config=bytes(range(64)))) as guest:
        assert guest.front.config(60) == bytes(range(60))
        assert guest.front.config(60) == bytes(range(60)), "again, for a function that is made again"
        assert guest.daemon.requests.count(Request.GET_CONFIG) == 1
        guest.enable()
        assert guest.mmio.read(guest.device, 4) == b"conf"


# --- interrupts


def test_no_interrupt_is_lost_while_its_vector_is_masked_or_msix_is_off() -> None:
    with serving(Daemon()) as guest:
        guest.start(vectors=(1, 2, 3))
        assert guest.asked(1, b"x") == b"X"
        until(lambda: MESSAGES[2][1] in guest.interrupts())
        entry = guest.bar + 0x4000 + 16 * 2
        guest.mmio.write(entry + 12, b"\1\0\0\0")
        assert guest.asked(1, b"y") == b"Y"
        until(lambda: bool(guest.mmio.read(guest.bar + 0x5000, 8)[0] & 1 << 2))
        assert guest.interrupts() == []
        guest.mmio.write(entry + 12, bytes(4))
        until(lambda: guest.interrupts() == [MESSAGES[2][1]])
        found = pciregs.capabilities(lambda offset, size: guest.config(offset, size))
        at = next(c.offset for c in found if c.id == pciregs.CAP_MSIX)
        guest.config(at + 2, 2, 0)
        assert guest.asked(1, b"z") == b"Z", "into the void"
        guest.config(at + 2, 2, pciregs.MSIX_ENABLE)
        until(lambda: MESSAGES[2][1] in guest.interrupts())
        assert guest.asked(1, b"!") == b"!"
        until(lambda: MESSAGES[2][1] in guest.interrupts())


def test_a_queue_gets_another_vector_or_none() -> None:
    with serving(Daemon()) as guest:
        guest.start(vectors=(1, 2, 3))
        guest.given()
        guest.write(22, 1, 2)
        guest.write(26, 3, 2)
        until(lambda: MESSAGES[3][1] in guest.interrupts())
        assert guest.asked(1, b"x") == b"X"
        until(lambda: MESSAGES[3][1] in guest.interrupts())
        guest.write(26, 0xFFFF, 2)
        until(lambda: not guest.front._loop._calls and not guest.remote._scheduled)
        until(lambda: guest.front.signals._thread is None)  # what it still signals is from before
        with guest.front.lock:
            guest.interrupts()
        assert guest.asked(1, b"y") == b"Y"
        assert guest.interrupts() == []


# --- memory


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_memory_comes_and_goes(options: dict[str, int]) -> None:
    """A buffer in memory that was added later; what is removed the daemon has no more."""
    with serving(Daemon(**options)) as guest:
        guest.start()
        for _ in range(3):
            region = guest.memory.add_ram(16 * MIB, MIB, backing=Backing.MEMFD)
            guest.front.audit()
            assert sorted(guest.daemon.table) == [0, 16 * MIB]
            ring = guest.rings[0]
            at = 2 * ring.added % ring.size
            guest.memory.write(17 * MIB - 5, b"added")
            ring.describe(at, 17 * MIB - 5, 5, NEXT, at + 1)
            ring.describe(at + 1, ring.buffers + 0x800 * at + 0x400, 0x400, WRITE)
            ring.offer(at)
            os.eventfd_write(guest.kvm.ioeventfds[guest.notifications, 2], 1)
            until(lambda: guest.answers(0) == [b"ADDED"])
            guest.memory.remove(region)
            assert sorted(guest.daemon.table) == [0]
            guest.front.audit()
        fd = os.memfd_create("kvmpass-test")
        os.truncate(fd, 3 * PAGE)
        os.pwrite(fd, b"of a file", 2 * PAGE)
        guest.memory.add_shared(16 * MIB, fd, PAGE, 2 * PAGE)
        os.close(fd)
        assert guest.daemon.access(16 * MIB, 9) == b"of a file"
        guest.memory.add_rom(32 * MIB, b"not for daemons")
        assert sorted(guest.daemon.table) == [0, 16 * MIB]
        assert guest.reasons == []


def test_a_daemon_that_takes_its_time_delays_no_other_memory() -> None:
    """Such as BARs, which a vCPU moves."""
    with serving(Daemon()) as guest:
        guest.start()
        guest.given()
        guest.daemon.going.clear()
        guest.write(20, 0, 1)
        until(lambda: not guest.front.lock.acquire(blocking=False) or bool(guest.front.lock.release()))
        mapping = HostMapping(PAGE)
        for _ in range(3):
            guest.memory.remove(guest.memory.add_bar(64 * MIB, PAGE, mapping, 0, "bar"))
            guest.memory.remove(guest.memory.add_rom(64 * MIB, b"rom"))
        mapping.close()
        assert guest.status == 0xF, "the daemon has not answered yet"
        guest.daemon.going.set()
        until(lambda: guest.status == 0)
        assert guest.reasons == []


def test_private_memory_is_refused() -> None:
    with serving(Daemon()) as guest:
        regions = len(guest.memory)
        with pytest.raises(GuestError, match=r"cannot reach extra .* private memory") as refused:
            guest.memory.add_ram(16 * MIB, PAGE, "extra")
        assert "backing=Backing.MEMFD" in refused.value.__notes__[0]
        assert len(guest.memory) == regions
        guest.front.audit()
    with Daemon() as daemon:
        driver = Driver()
        with pytest.raises(GuestError, match=r"cannot reach ram .* private memory"):
            FrontEnd("it", daemon.front, driver.memory, lambda reason: None)
        driver.memory.add_ram(16 * MIB, PAGE, "extra")
        driver.close()
        driver.memory.close()


@pytest.mark.parametrize("options", [{"protocol": 0}, {"slots": 8}], ids=["of a table", "of its own"])
def test_the_daemons_limit_of_regions(options: dict[str, int]) -> None:
    with serving(Daemon(**options)) as guest:
        for number in range(7):
            guest.memory.add_ram((16 + number) * MIB, PAGE, backing=Backing.MEMFD)
        with pytest.raises(LayoutError, match="more: the daemon of it takes 8 regions of RAM"):
            guest.memory.add_ram(32 * MIB, PAGE, "more", backing=Backing.MEMFD)
        guest.memory.add_rom(33 * MIB, b"rom")
        assert len(guest.daemon.table) == 8


def test_rings_in_memory_that_is_removed() -> None:
    """They are taken back before; the driver is told, and the daemon serves others after that."""
    with serving(Daemon()) as guest:
        region = guest.memory.add_ram(16 * MIB, MIB, backing=Backing.MEMFD)
        guest.enable()
        guest.negotiate()
        guest.add_queue(0, enable=False)
        for offset, place in ((32, 0), (40, 0x400), (48, 0x800)):
            guest.write(offset, 16 * MIB + place, 4)
        guest.write(28, 1, 2)
        guest.ready()
        guest.given()
        guest.memory.remove(region)
        assert (guest.daemon.rings, sorted(guest.daemon.table)) == ({}, [0])
        until(lambda: bool(guest.status & NEEDS_RESET))
        guest.start()
        assert guest.asked(0, b"x") == b"X"
        assert guest.reasons == []


@pytest.mark.parametrize("place", [8 * MIB, 4 * MIB - 16], ids=["in ROM", "across the end"])
def test_rings_that_a_daemon_cannot_reach(place: int) -> None:
    with serving(Daemon()) as guest:
        guest.memory.add_ram(4 * MIB, PAGE, backing=Backing.MEMFD)
        guest.enable()
        guest.negotiate()
        guest.add_queue(0, enable=False)
        guest.write(32, place, 4)
        guest.write(28, 1, 2)
        guest.ready()
        assert guest.status & NEEDS_RESET
        until(lambda: not guest.front._loop._calls)
        assert guest.daemon.rings == {}
        guest.start()
        assert guest.asked(0, b"x") == b"X"


# --- the machine's reset


def test_the_function_is_made_again() -> None:
    """The connection outlives it: the new function is there before the old one is closed."""
    with serving(Daemon()) as guest:
        guest.start()
        assert guest.asked(0, b"x") == b"X"
        old = guest.function
        guest.pci.unplug(old)
        guest.make()
        old.close()
        assert guest.daemon.rings == {}
        guest.start()
        assert guest.asked(1, b"y") == b"Y"
        assert guest.daemon.requests.count(Request.SET_OWNER) == 1


# --- daemons that are rude

SETUP = (
    Request.GET_FEATURES,
    Request.GET_PROTOCOL_FEATURES,
    Request.SET_OWNER,
    Request.GET_QUEUE_NUM,
    Request.GET_MAX_MEM_SLOTS,
    Request.ADD_MEM_REG,
)
START = (
    Request.SET_FEATURES,
    Request.SET_VRING_NUM,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_BASE,
    Request.SET_VRING_CALL,
    Request.SET_VRING_KICK,
    Request.SET_VRING_ENABLE,
)
HARMLESS = {("refuse", request) for request in Request if request.name.startswith("GET")}


@pytest.mark.parametrize("how", [*RUDENESS, *OTHERS])
def test_rudeness_at_set_up(how: str) -> None:
    """One clear end: the constructor raises, and leaves nothing."""
    for request in SETUP:
        if (how, request) in HARMLESS or (how, request) == ("twice", Request.ADD_MEM_REG):
            continue
        with Daemon(rude={request: how}) as daemon:
            driver = Driver(backing=Backing.MEMFD)
            heard: list[str] = []
            with pytest.raises(DaemonError, match="the daemon of it") as raised:
                seconds = 0.3 if how in SILENT else 10
                FrontEnd("it", daemon.front, driver.memory, heard.append, seconds=seconds)
            print(request.name, raised.value)
            assert daemon.front.fileno() == -1
            driver.memory.add_ram(16 * MIB, PAGE)
            assert heard == []
            driver.close()
            driver.memory.close()


@pytest.mark.parametrize("how", [*RUDENESS, *OTHERS])
def test_rudeness_at_start_and_reset(how: str) -> None:
    """One clear end: the driver is told, once; its reset comes to an end; nothing else is delayed or changed."""
    for request in (*START, Request.GET_VRING_BASE, Request.REM_MEM_REG):
        if (how, request) in HARMLESS:
            continue
        with serving(Daemon(rude={request: how})) as guest:
            guest.hurry(how)
            region = guest.memory.add_ram(16 * MIB, MIB, backing=Backing.MEMFD)
            guest.start()
            if request not in START:
                guest.given()
                guest.write(20, 0, 1)
                until(lambda: guest.status == 0)
                guest.memory.remove(region)
            print(request.name, guest.lost())
            guest.write(20, 0, 1)
            assert guest.status == 0
            guest.memory.add_ram(32 * MIB, PAGE)
            guest.start()
            assert guest.status & NEEDS_RESET, "there is no daemon any more"
            guest.front.audit()


def test_a_daemon_that_ends() -> None:
    with serving(Daemon()) as guest:
        guest.start()
        assert guest.asked(0, b"x") == b"X"
        guest.daemon.end()
        assert guest.lost() == "the daemon of it has closed the connection"
        assert guest.status & NEEDS_RESET
        until(lambda: MESSAGES[0][1] in guest.interrupts())
        guest.send(0, b"nobody hears that")
        guest.write(20, 0, 1)
        assert guest.status == 0


def test_a_daemon_that_speaks_unasked() -> None:
    with serving(Daemon()) as guest:
        guest.start()
        assert guest.asked(0, b"x") == b"X"
        guest.daemon._socket.send(b"hello")
        assert guest.lost() == "the daemon of it has sent what nobody asked for"


class Slow(Daemon):
    """Takes a part of the time limit for each request."""

    delay = 0.0

    def _handle(self, *message: Any) -> bytes | None:
        time.sleep(self.delay)
        return super()._handle(*message)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_daemon_that_is_slow_each_time(options: dict[str, int]) -> None:
    """All requests of a start have one time limit: no lock is held for longer."""
    with serving(Slow(**options)) as guest:
        guest.front._connection.seconds = 0.5
        assert isinstance(guest.daemon, Slow)
        guest.daemon.delay = 0.1
        started = time.monotonic()
        guest.start()
        assert guest.lost().endswith("within 0.5 seconds")
        with guest.front.lock:
            assert 0.5 <= time.monotonic() - started < 0.5 + 20 * 0.1
        guest.daemon.delay = 0.0


def test_a_daemon_that_is_slow_to_map_memory_delays_no_vcpu() -> None:
    """A running machine gets a device: vCPUs move BARs meanwhile. Memory that is removed meanwhile is not sent."""
    with Slow() as daemon:
        driver = Driver(backing=Backing.MEMFD)
        region = driver.memory.add_ram(16 * MIB, PAGE, backing=Backing.MEMFD)
        made: list[FrontEnd] = []
        daemon.delay = 0.2
        thread = threading.Thread(
            target=lambda: made.append(FrontEnd("it", daemon.front, driver.memory, lambda reason: None))
        )
        thread.start()
        until(lambda: Request.GET_MAX_MEM_SLOTS in daemon.requests)
        until(lambda: bool(driver.memory._listeners))
        daemon.going.clear()
        mapping, started = HostMapping(PAGE), time.monotonic()
        for _ in range(3):
            driver.memory.remove(driver.memory.add_bar(64 * MIB, PAGE, mapping, 0, "bar"))
        assert time.monotonic() - started < 5, "they have waited for the daemon"
        assert not made, "the daemon has yet to map the memory"
        daemon.going.set()
        driver.memory.remove(region)
        thread.join(20)
        assert sorted(daemon.table) == [0]
        made[0].audit()
        made[0].close()
        mapping.close()
        driver.close()
        driver.memory.close()


def test_a_daemon_that_does_not_read() -> None:
    """The socket is full: the front end does not wait for ever."""
    with serving(Daemon()) as guest:
        guest.start()
        assert guest.asked(0, b"x") == b"X"
        guest.hurry()
        guest.daemon.going.clear()
        with guest.front.lock:
            guest.daemon.front.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    guest.daemon.front.send(bytes(1 << 16))
        guest.write(20, 0, 1)
        assert guest.lost() == "the daemon of it does not read SET_VRING_ENABLE"
        assert guest.status == 0
        guest.daemon.going.set()
        guest.daemon.join(20)
        assert isinstance(guest.daemon.error, ValueError), "it has read what the test has sent"
        guest.daemon.error = None


def test_rubbish_in_the_used_ring() -> None:
    """It concerns the guest alone."""
    with serving(Daemon()) as guest:
        guest.start()
        assert guest.asked(0, b"x") == b"X"
        for place in guest.daemon.rings[0].places:
            guest.daemon.access(place, 0, b"\xa5" * 100)
        os.eventfd_write(guest.daemon.rings[0].files[Request.SET_VRING_CALL], (1 << 63) - 1)
        guest.write(20, 0, 1)
        until(lambda: guest.status == 0)
        guest.start()
        assert guest.asked(0, b"y") == b"Y"
        assert guest.reasons == []


def test_daemons_that_are_of_no_use() -> None:
    for options, message in (
        ({"features": PROTOCOL_FEATURES}, "is older than version 1"),
        ({"slots": 0}, "takes no memory"),
        ({"queues": 2}, "serves 2 queues, not 3"),
        ({"queues": 0}, "serves 0 queues, not 3"),
    ):
        with Daemon(**options) as daemon, pytest.raises(DaemonError, match=message):
            guest = Guest.__new__(Guest)
            try:
                guest.__init__(daemon)  # type: ignore[misc]
            finally:
                if hasattr(guest, "front"):
                    guest.front.close()
                guest.memory.close()
    with serving(Daemon(protocol=0)) as guest, pytest.raises(DaemonError, match="has no configuration structure"):
        guest.front.config(4)


def test_a_daemon_has_no_ring_while_the_function_may_not_access_memory() -> None:
    """Then it goes on where it was."""
    with serving(Daemon()) as guest:
        guest.start()
        assert [guest.asked(1, b"a"), guest.asked(1, b"b")] == [b"A", b"B"]
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY)
        until(lambda: guest.daemon.rings == {})
        guest.send(1, b"c")
        assert guest.status == 0xF
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
        until(lambda: guest.answers(1) == [b"C"])
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY)
        guest.write(20, 0, 1)
        until(lambda: guest.status == 0)
        guest.enable(pciregs.COMMAND_MEMORY)
        guest.negotiate()
        guest.rings = [guest.add_queue(0)]
        guest.ready()
        guest.send(0, b"too early")
        assert guest.daemon.rings == {}
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
        until(lambda: guest.answers(0) == [b"TOO EARLY"])
