"""Split virtqueues, the device's side (Virtual I/O Device 1.2, section 2.7).

A guest may write anything into its rings, at any time: each field is read once, and checked before it is used. What a
driver must not do is a ``RingError``: the transport then needs a reset, and the guest runs on.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvmpass.layout import Range
from kvmpass.memory import GuestMemory
from kvmpass.virtio.interrupts import VectorSink
from kvmpass.virtio.signals import Signals

MAX_CHAIN_BYTES = 1 << 20
"""Bytes that one chain may read or write: what Linux sends is at most the capacity of a pipe."""

_ENTRY = "QIHH"  # of a descriptor table: address, length, flags, next
_DESCRIPTOR = struct.Struct(f"<{_ENTRY}")
_INDEX = struct.Struct("<H")  # the whole field in one access, as struct copies native sizes
_USED = struct.Struct("<II")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1  # of the available ring's flags
_NO_NOTIFY = 1  # of the used ring's


def _store(ring: memoryview, at: int, value: int) -> None:
    """Write the 16-bit field number ``at`` of a ring in one store.

    ``pack_into`` would clear it first, and a driver that reads it then takes that for the index.
    """
    ring.cast("H")[at] = value


class RingError(Exception):
    """The driver has violated the rules of the rings."""


def _views(memory: GuestMemory, parts: Sequence[tuple[int, int]], *, write: bool) -> list[memoryview]:
    try:
        return memory.dma_views(parts, write=write)
    except IndexError as error:
        raise RingError(str(error)) from None


def _copy(data: bytes | bytearray | memoryview, views: Iterable[memoryview]) -> int:
    """Copy as much of ``data`` as there is room for; return its size."""
    source, at = memoryview(data), 0
    for view in views:
        part = source[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at


class Chain:
    """A chain of descriptors: what the device reads, then what it writes."""

    __slots__ = ("_memory", "head", "readable", "room", "writable")

    def __init__(self, memory: GuestMemory, head: int) -> None:
        self._memory = memory
        self.head = head
        """The index of its first descriptor."""
        self.readable: list[tuple[int, int]] = []
        """Guest-physical addresses and sizes of the parts that the device reads."""
        self.writable: list[tuple[int, int]] = []
        """The same of the parts that it writes."""
        self.room = 0
        """Bytes that the device may write."""

    def check(self) -> None:
        """Note that all parts are there. Raises ``RingError`` if they are too many bytes."""
        self.room = sum([length for _, length in self.writable])
        if max(self.room, sum([length for _, length in self.readable])) > MAX_CHAIN_BYTES:
            raise RingError(f"a chain of more than {MAX_CHAIN_BYTES} bytes")

    def read(self) -> bytes:
        """Return a copy of what the device reads. Raises ``RingError`` outside of RAM."""
        return b"".join(_views(self._memory, self.readable, write=False))

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write as much of ``data`` as there is room for; return its size. Raises ``RingError`` outside of RAM."""
        return _copy(data, _views(self._memory, self.writable, write=True))


class Virtqueue:
    """One queue. The driver sets the public fields before it enables it.

    Synchronization: with the transport's lock and ``GuestMemory.lock`` held.
    """

    def __init__(self, memory: GuestMemory, max_size: int, sink: VectorSink) -> None:
        self._memory = memory
        self.max_size = max_size
        """Entries that the device offers."""
        self._sink = sink
        self.kick = -1
        """The eventfd that KVM signals for a notification; -1: it exits."""
        self._fence = threading.Lock()
        self.indirect = False
        """Whether the driver has accepted indirect descriptors."""
        self.reset()

    def reset(self) -> None:
        """Forget what the driver has set."""
        self.size = self.max_size
        """Entries in use, a power of two."""
        self.descriptors = self.available = self.used = 0
        """Guest-physical addresses of the table and of the two rings."""
        self.vector = 0xFFFF
        """The MSI-X vector of its interrupt; 0xffff: none."""
        self.enabled = False
        """Whether the driver has enabled it."""
        self._next = self._done = 0  # available entries taken, used entries returned, modulo 2^16
        self._notify = True
        self._state: object = None
        self._parts: tuple[memoryview, memoryview, memoryview]

    def enable(self) -> None:
        """Use the rings from now on. Raises ``RingError`` where they cannot be."""
        if not 0 < self.size <= self.max_size or self.size & self.size - 1:
            raise RingError(f"a queue of {self.size} entries")
        if self.descriptors % 16 or self.available % 2 or self.used % 4:
            raise RingError("an address of a ring is not aligned")
        self._rings()
        self.enabled = True

    # --- the rings

    def _rings(self) -> tuple[memoryview, memoryview, memoryview]:
        """Return descriptors, available and used ring, as long as memory is as it was when they were found."""
        state = self._memory.state
        if state is not self._state:
            descriptors, available, used = self.places
            self._parts = (
                self._one(descriptors, write=False),
                self._one(available, write=False),
                self._one(used, write=True),
            )
            self._state = state
        return self._parts

    @property
    def places(self) -> tuple[Range, Range, Range]:
        """Where descriptors, available and used ring are: guest-physical addresses."""
        size = self.size
        return (
            Range(self.descriptors, 16 * size),
            Range(self.available, 6 + 2 * size),
            Range(self.used, 6 + 8 * size),
        )

    def _one(self, place: Range, *, write: bool) -> memoryview:
        views = _views(self._memory, [(place.start, place.size)], write=write)
        if len(views) != 1:
            raise RingError("a ring is in two regions of memory")
        return views[0]

    def _barrier(self) -> None:
        """Order what was written before what is read next: taking a lock is a full barrier on x86."""
        with self._fence:
            pass

    def pop(self) -> Chain | None:
        """Return the next chain, None if the driver has added none. Raises ``RingError``."""
        return self._pop() if self.added() else None

    def _pop(self) -> Chain:
        table, available, _ = self._rings()
        head = _INDEX.unpack_from(available, 4 + 2 * (self._next % self.size))[0]
        chain = Chain(self._memory, head)
        self._follow(chain, table, head, self.size, direct=True)
        self._next = (self._next + 1) & 0xFFFF
        return chain

    def added(self) -> int:
        """Return the number of chains that the driver has added. Raises ``RingError``."""
        added: int = (_INDEX.unpack_from(self._rings()[1], 2)[0] - self._next) & 0xFFFF
        if added > self.size:
            raise RingError(f"{added} new entries in a queue of {self.size}")
        return added

    def _follow(self, chain: Chain, table: memoryview | bytes, at: int, count: int, *, direct: bool) -> None:
        """Collect the descriptors of a table from ``at`` on: as many as the queue has entries, or it is a loop.

        (2.7.4.2: parts that the device writes come last.)
        """
        readable, writable = chain.readable, chain.writable
        for _ in range(self.size):
            if at >= count:
                raise RingError(f"descriptor {at} of a table of {count}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * at)
            if flags & _INDIRECT:
                if not (direct and self.indirect) or flags & _NEXT:
                    raise RingError("an indirect descriptor where none may be")
                if not length or length % 16 or length > 16 * self.size:
                    raise RingError(f"an indirect table of {length} bytes")
                # Copied: the guest may change it meanwhile.
                inside = b"".join(_views(self._memory, [(address, length)], write=False))
                if not (chain.writable or self._in_order(chain, inside)):
                    self._follow(chain, inside, 0, length // 16, direct=False)
                return
            if flags & _WRITE:
                writable.append((address, length))
            elif writable:
                raise RingError("a part that the device reads comes after one that it writes")
            else:
                readable.append((address, length))
            if not flags & _NEXT:
                chain.check()
                return
            at = following
        raise RingError("a chain that does not end")

    @staticmethod
    def _in_order(chain: Chain, table: bytes) -> bool:
        """Collect a table that is read, one entry after the other, as Linux makes them. Return whether it is one."""
        count = len(table) // 16
        fields = struct.unpack(f"<{_ENTRY * count}", table)
        if fields[2::4] != (_NEXT,) * (count - 1) + (0,) or fields[3:-1:4] != tuple(range(1, count)):
            return False
        chain.readable += zip(fields[::4], fields[1::4], strict=True)
        chain.check()
        return True

    def push(self, chain: Chain, written: int) -> None:
        """Return ``chain`` to the driver, with ``written`` bytes in it. Raises ``RingError``."""
        self._return([(chain.head, written)])

    def _return(self, chains: Iterable[tuple[int, int]]) -> None:
        """Return chains to the driver: their first descriptors, and the bytes that were written into each."""
        used, done, size = self._rings()[2], self._done, self.size
        for head, written in chains:
            _USED.pack_into(used, 4 + 8 * (done % size), head, written)
            done = (done + 1) & 0xFFFF
        self._done = done
        _store(used, 1, done)  # after the entries: x86 keeps the order of stores

    def fill(self, wanted: int, take: Callable[[int], bytes]) -> int:
        """Write ``wanted`` bytes, as far as the driver has added chains, into these, one after the other.

        ``take`` returns as many bytes as it is called with. Return the number of chains that were used. Raises
        ``RingError``.
        """
        parts, sizes, room = list[tuple[int, int]](), list[tuple[int, int]](), 0
        table, available, _ = self._rings()
        for _ in range(self.added()):
            if room >= wanted:
                break
            head = _INDEX.unpack_from(available, 4 + 2 * (self._next % self.size))[0]
            address, length, flags, _ = (
                _DESCRIPTOR.unpack_from(table, 16 * head) if head < self.size else (0, 0, 0, 0)
            )
            if flags == _WRITE and length <= MAX_CHAIN_BYTES:  # all that Linux adds
                self._next = (self._next + 1) & 0xFFFF
                parts.append((address, length))
            else:
                chain = self._pop()
                head, length = chain.head, chain.room
                parts += chain.writable
            sizes.append((head, length))
            room += length
        if not sizes:
            return 0
        views = _views(self._memory, parts, write=True)
        data = take(min(room, wanted))
        _copy(data, views)
        left, written = len(data), list[tuple[int, int]]()
        for head, length in sizes:
            written.append((head, min(length, left)))
            left -= written[-1][1]
        self._return(written)
        return len(written)

    def interrupt(self) -> None:
        """Signal the driver that chains were returned, unless it has turned that off. Raises ``RingError``."""
        self._barrier()
        if not _INDEX.unpack_from(self._rings()[1], 0)[0] & _NO_INTERRUPT:
            self._sink.signal_queue(self.vector)

    def call(self, signals: Signals) -> int:
        """Return a duplicate of the eventfd of its interrupt; -1 without one. See ``VectorSink.duplicate``."""
        return self._sink.duplicate(self.vector, signals)

    def want_notifications(self, wanted: bool) -> None:
        """Ask the driver to notify the device of new chains, or not to. Look for chains after this, not before.

        Raises ``RingError``.
        """
        if wanted != self._notify:
            self._notify = wanted
            _store(self._rings()[2], 0, 0 if wanted else _NO_NOTIFY)
            self._barrier()

    def chains(self) -> Iterator[Chain]:
        """Pop the chains that there are now, not those that are added meanwhile. Raises ``RingError``."""
        for _ in range(self.added()):
            yield self._pop()
