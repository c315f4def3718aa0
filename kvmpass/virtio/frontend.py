"""A daemon that serves a virtio device: its connection, what it has of the guest's memory, and of the device's rings.

The daemon is inside the guest's trust: it maps all of the guest's RAM, may write to it at any time, and signals what
it likes. It cannot hold up this process, nor end it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from kvmpass._dataclass import dataclass
from kvmpass._eventloop import EventLoop
from kvmpass._ratelimit import limited_log
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import DaemonError, GuestError, LayoutError
from kvmpass.layout import Range
from kvmpass.memory import GuestMemory, MemoryRegion, RegionKind
from kvmpass.memory.audit import Mirrored, compare
from kvmpass.virtio.device import VERSION_1
from kvmpass.virtio.signals import Signals
from kvmpass.virtio.vhost_user import (
    CONFIG,
    CONFIGURE_MEM_SLOTS,
    MAX_QUEUES,
    MAX_TABLE,
    MQ,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    SECONDS,
    Connection,
    Request,
    SharedRegion,
)

log = limited_log(__name__)

_SLOTS_LIMIT = 4096  # regions, whatever a daemon says
_TABLE_SECONDS_PER_GIB = 1.0  # for mapping memory, beyond the time of any conversation


@dataclass(frozen=True, slots=True)
class RemoteRing:
    """A ring, as the driver has set it up, for a daemon to serve."""

    number: int
    """Of its queue."""
    size: int
    """Entries."""
    places: tuple[Range, Range, Range]
    """Descriptors, available and used ring: guest-physical addresses."""
    kick: int
    """The eventfd that KVM signals when the driver has added buffers."""


class FrontEnd:
    """A connection to a daemon over ``connection``, which it takes over, and a listener of ``memory``.

    ``on_end`` is called once, in a thread of this object, with the reason: the daemon has ended, has not answered in
    time, or has violated the protocol. The connection is closed then, and the rings are left as they are.
    ``seconds``: the time limit of a conversation, of all its requests together.

    Raises ``DaemonError``, ``GuestError`` where RAM is private.

    Synchronization: from any thread; ``lock`` guards the conversation, the table and the rings. It is taken after
    ``GuestMemory.lock`` and held for the time limit of a conversation, once.
    """

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        memory: GuestMemory,
        on_end: Callable[[str], None],
        *,
        seconds: float = SECONDS,
    ) -> None:
        self.name = name
        """The device, for messages."""
        self._memory = memory
        self._on_end = on_end
        self.lock = threading.RLock()
        """Held for a conversation of several requests."""
        self.ended = ""
        """Why the connection is closed; empty: it is not."""
        self.on_loss: Callable[[str], None] = lambda reason: None
        """Set by the device in use. Called in this object's thread when the daemon no longer serves the rings."""
        self.signals = Signals(name)
        """Signals eventfds that the daemon has, too."""
        self._config = b""
        self._table: dict[MemoryRegion, SharedRegion] = {}
        self._rings: dict[int, RemoteRing] = {}
        self._connection = Connection(connection, name, seconds)
        self._nobody = -1
        self._loop = EventLoop(name)
        self._listening = False
        with undo_on_error(self.close):
            self._nobody = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            with self._connection.conversation():
                self._negotiate()
            memory.listen(self)
            with self.lock:  # without that of the memory, for which vCPUs wait
                self._send_table()
                self._listening = True
            self._loop.add_reader(self._connection.fileno(), self._on_readable)

    def _negotiate(self) -> None:
        talk = self._connection
        self.features = talk.number(Request.GET_FEATURES)
        """The feature bits that the daemon offers."""
        if not self.features & VERSION_1:
            raise self._refusal("is older than version 1 of virtio", "use another daemon")
        self._protocol = 0
        self.queues = MAX_QUEUES
        """The largest number of queues, as far as the daemon tells it."""
        self._slots = MAX_TABLE
        if self.features & PROTOCOL_FEATURES:
            offered = talk.number(Request.GET_PROTOCOL_FEATURES)
            self._protocol = offered & (MQ | REPLY_ACK | CONFIG | CONFIGURE_MEM_SLOTS)
            talk.set_number(Request.SET_PROTOCOL_FEATURES, self._protocol)
            talk.acknowledges = bool(self._protocol & REPLY_ACK)
        talk.order(Request.SET_OWNER, b"")
        if self._protocol & MQ:
            self.queues = min(talk.number(Request.GET_QUEUE_NUM), MAX_QUEUES)
        if self._protocol & CONFIGURE_MEM_SLOTS:
            self._slots = min(talk.number(Request.GET_MAX_MEM_SLOTS), _SLOTS_LIMIT)
            if not self._slots:
                raise self._refusal("takes no memory", "use another daemon")

    def _refusal(self, what: str, remedy: str) -> DaemonError:
        return DaemonError(f"the daemon of {self.name} {what}", remedy)

    def config(self, size: int) -> bytes:
        """Return ``size`` bytes of the device's configuration structure, as the daemon had it when first asked.

        A machine's reset constructs the device again, also where the daemon has ended. Raises ``DaemonError``.
        """
        with self.lock:
            if not self._protocol & CONFIG:
                raise self._refusal("has no configuration structure", "use a daemon for this kind of device")
            if len(self._config) != size:
                self._config = self._connection.config(size)
            return self._config

    # --- the end

    @contextmanager
    def conversation(self) -> Iterator[None]:
        """Hold the lock for several requests, which have one time limit."""
        with self.lock, self._connection.conversation():
            yield

    @contextmanager
    def _talking(self) -> Iterator[Connection]:
        """Hold the lock. What the daemon does wrong ends the connection, and is not raised; nor is its end before."""
        with self.conversation():
            try:
                yield self._connection
            except (DaemonError, OSError) as error:
                self._fail(str(error))

    def _fail(self, reason: str) -> None:
        if not self.ended:
            self.ended = reason
            self._loop.remove_reader(self._connection.fileno())
            self._connection.close()
            self._rings.clear()
            self._table.clear()
            self._loop.call(self._report)

    def _report(self) -> None:
        self.on_loss(self.ended)
        self._on_end(self.ended)

    def _on_readable(self) -> None:
        with self._talking() as talk:
            if not self.ended:
                talk.check_idle()

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` in the thread of this object."""
        self._loop.call(function)

    def close(self) -> None:
        """Close the connection, when the device that uses the rings is closed. Idempotent."""
        with self.lock:
            closed, self.ended = self.ended == _CLOSED, _CLOSED
            self._rings.clear()
            self._table.clear()
        if not closed:
            self._memory.unlisten(self)
            run_all(self._loop.close, self.signals.close, self._connection.close, self._close_nobody)

    def _close_nobody(self) -> None:
        if self._nobody >= 0:
            os.close(self._nobody)

    # --- memory: a RegionListener

    def _reached(self, region: MemoryRegion) -> bool:
        """Whether the daemon maps the region. Raises ``GuestError`` for private RAM: it may have buffers in it."""
        if region.kind is RegionKind.RAM and region.file < 0:
            raise GuestError(
                f"the daemon of {self.name} cannot reach {region.name} {region.range}, which is private memory",
                "make the machine with backing=Backing.MEMFD, and add memory with it",
            )
        return region.kind is RegionKind.RAM

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """Refuse more RAM regions than the daemon can have."""
        if kind is RegionKind.RAM and not self.ended and len(self._table) >= self._slots:
            raise LayoutError(f"{name}: the daemon of {self.name} takes {self._slots} regions of RAM, no more")

    def region_added(self, region: MemoryRegion) -> None:
        """Let the daemon map the region before it is used."""
        if self.ended or not self._reached(region):
            return
        with self._talking() as talk:
            if not self.ended:
                shared = SharedRegion(region.gpa, region.size, region.file_offset, region.file)
                self._table[region] = shared
                if self._listening:
                    self._change_table(region.size, lambda: talk.add_region(shared))

    def region_removed(self, region: MemoryRegion) -> None:
        """Let the daemon unmap the region. Rings in it are taken back: the driver must reset the device."""
        if region not in self._table:  # such as a BAR, which a vCPU moves: it waits for no daemon
            return
        with self._talking() as talk:
            if region in self._table:
                if any(place.overlaps(region.range) for ring in self._rings.values() for place in ring.places):
                    self._take_all()
                    self._loop.call(lambda: self.on_loss("memory of its rings was removed"))
                shared = self._table.pop(region)
                if self._listening:
                    self._change_table(0, lambda: talk.remove_region(shared))

    def holds(self, region: MemoryRegion) -> bool:
        """Return False: what a daemon has mapped are the file's pages, not this process's mapping of them."""
        return False

    def _change_table(self, size: int, change: Callable[[], None]) -> None:
        """Change the daemon's memory by one message, or replace all of it where it knows no other way."""
        if self._protocol & CONFIGURE_MEM_SLOTS:
            with self._connection.conversation(_more_time(size)):
                change()
                self._connection.settle()
        else:
            self._send_table()

    def _send_table(self) -> None:
        """Send all regions. Raises ``DaemonError``."""
        size = sum(region.size for region in self._table.values())
        with self._connection.conversation(_more_time(size)):
            if self._protocol & CONFIGURE_MEM_SLOTS:
                for region in self._table.values():
                    self._connection.add_region(region)
            else:
                self._connection.set_table(list(self._table.values()))
            self._connection.settle()

    def reaches(self, place: Range) -> bool:
        """Return whether all of ``place`` is in one region that the daemon has."""
        return any(region.range.contains(place) for region in tuple(self._table))

    def audit(self) -> None:
        """Compare the memory that the daemon has with the guest's RAM. Raises ``AuditFailed``."""
        with self._memory.lock, self.lock:
            if not self.ended:
                regions = [region for region in self._memory if region.kind is RegionKind.RAM]
                wanted = {Mirrored(region.range, region.file_offset, True) for region in regions}
                found = {Mirrored(Range(r.gpa, r.size), r.offset, True) for r in self._table.values()}
                compare(f"regions of the daemon of {self.name}", wanted, found)

    # --- rings

    def give(
        self, features: int, rings: Sequence[RemoteRing], calls: Mapping[int, int], bases: Mapping[int, int]
    ) -> None:
        """Let the daemon serve ``rings`` for a driver that has accepted ``features``.

        ``calls``: the eventfds for their interrupts, -1: none; ``bases``: the next available entries of rings that
        ``take`` has returned.
        """
        with self._talking() as talk:
            talk.set_number(Request.SET_FEATURES, features | self.features & PROTOCOL_FEATURES)
            for ring in rings:
                descriptors, available, used = ring.places
                talk.set_state(Request.SET_VRING_NUM, ring.number, ring.size)
                talk.set_state(Request.SET_VRING_BASE, ring.number, bases.get(ring.number, 0))
                talk.set_addresses(ring.number, descriptors.start, available.start, used.start)
                self._set_call(ring.number, calls[ring.number])
                self._rings[ring.number] = ring
                talk.set_file(Request.SET_VRING_KICK, ring.number, ring.kick)  # starts the ring
            self._enable(True)
            talk.settle()
            for ring in rings:  # the daemon may have dropped what has come before the ring was enabled
                self.kick(ring)

    def kick(self, ring: RemoteRing) -> None:
        """Notify the daemon of buffers in ``ring``, without blocking."""
        self.signals.send(("kick", ring.number), ring.kick)

    def renew_calls(self, calls: Mapping[int, int]) -> None:
        """Let the daemon signal these eventfds, by ring, from now on; -1: none."""
        with self._talking() as talk:
            for number, eventfd in calls.items():
                self._set_call(number, eventfd)
            talk.settle()

    def take(self) -> dict[int, int]:
        """Take all rings back: the daemon accesses no memory after this, or the connection is closed.

        Returns the next available entry of each.
        """
        with self._talking():
            return self._take_all()
        return {}

    # What follows raises DaemonError.

    def _enable(self, enabled: bool) -> None:
        if self.features & PROTOCOL_FEATURES:
            for number in self._rings:
                self._connection.set_state(Request.SET_VRING_ENABLE, number, int(enabled))

    def _set_call(self, number: int, eventfd: int) -> None:
        self._connection.set_file(Request.SET_VRING_CALL, number, eventfd if eventfd >= 0 else self._nobody)

    def _take_all(self) -> dict[int, int]:
        self._enable(False)
        bases = {}
        for number in list(self._rings):
            bases[number] = self._connection.take_ring(number)
            del self._rings[number]
        return bases


def _more_time(size: int) -> float:
    return _TABLE_SECONDS_PER_GIB * (size >> 30)


_CLOSED = "it is closed"
