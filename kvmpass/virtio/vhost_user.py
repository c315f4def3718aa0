"""The front end's side of the vhost-user protocol: messages over a Unix socket (QEMU, docs/interop/vhost-user.rst).

A daemon may answer anything, at any time, or never: each answer has a time limit and is checked. What does not follow
the protocol is a ``DaemonError``, after which the connection is of no use.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvmpass._dataclass import dataclass
from kvmpass._fd import failure
from kvmpass.errors import DaemonError

SECONDS = 10.0
"""Time limit of a conversation. A daemon finishes the requests of a ring before it returns it."""
PROTOCOL_FEATURES = 1 << 30
"""Feature bit: the daemon has protocol features, and rings are off until they are enabled. No guest sees it."""
MQ, REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS = 1 << 0, 1 << 3, 1 << 9, 1 << 15
"""Protocol features that are used where a daemon has them."""
MAX_TABLE = 8
"""Regions of a ``SET_MEM_TABLE``."""
MAX_QUEUES = 256
"""Queues that messages can name."""

_HEADER = struct.Struct("<III")  # request, flags, size of the payload
_VERSION, _REPLY, _NEED_REPLY = 1, 1 << 2, 1 << 3
_NUMBER = struct.Struct("<Q")
_STATE = struct.Struct("<II")  # ring, number
_ADDRESSES = struct.Struct("<IIQQQQ")  # ring, flags, descriptors, used, available, log
_REGION = struct.Struct("<QQQQ")  # guest address, size, user address, offset in the file
_CONFIG = struct.Struct("<III")  # offset, size, flags


class Request(enum.IntEnum):
    """What the front end sends."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A region of guest memory, as a daemon maps it."""

    gpa: int
    """Its guest-physical address; its "user address" in messages, too: this process's own say nothing to a daemon."""
    size: int
    """Bytes."""
    offset: int
    """Bytes from the start of the file."""
    file: int
    """A descriptor of the file."""

    @property
    def packed(self) -> bytes:
        """The region in a message."""
        return _REGION.pack(self.gpa, self.size, self.gpa, self.offset)


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """Connect to the daemon that listens at ``path``. Raises ``OSError`` (``ENOENT``, ``ECONNREFUSED``, time-out)."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(SECONDS)
    try:
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        remedy = "check that the daemon runs and listens there"
        raise failure(error.errno or 0, "connect", f"{os.fspath(path)}: {error.strerror}", remedy) from None
    return connection


class Connection:
    """A connection to a daemon, one request at a time. It takes over the socket.

    Every method that talks raises ``DaemonError``; the connection is then of no use.

    Synchronization: one thread at a time.
    """

    def __init__(self, connection: socket.socket, name: str, seconds: float) -> None:
        self._socket = connection
        self._name = name
        self.seconds = seconds
        """The time limit of a conversation: of one request, or of those within ``conversation``."""
        self._deadline: float | None = None  # of the conversation
        self.acknowledges = False
        """Whether the daemon acknowledges each request (``REPLY_ACK``)."""

    def fileno(self) -> int:
        """Return the socket's descriptor; -1 once it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    @contextmanager
    def conversation(self, more: float = 0.0) -> Iterator[None]:
        """Give the requests of the block ``seconds`` and ``more`` together; within another, ``more`` in addition."""
        before = self._deadline
        self._deadline = (time.monotonic() + self.seconds if before is None else before) + more
        try:
            yield
        finally:
            self._deadline = None if before is None else before + more

    def _until(self) -> float:
        return time.monotonic() + self.seconds if self._deadline is None else self._deadline

    # --- one message

    def _send(self, request: Request, flags: int, payload: bytes, fds: Sequence[int], deadline: float) -> None:
        data = _HEADER.pack(request, _VERSION | flags, len(payload)) + payload
        try:
            self._limit(deadline)
            sent = socket.send_fds(self._socket, [data], list(fds))
            while sent < len(data):
                self._limit(deadline)
                sent += self._socket.send(data[sent:])
        except TimeoutError:
            raise self._error(f"does not read {request.name}") from None
        except OSError as error:
            raise self._error(f"has closed the connection ({error.strerror} at {request.name})") from None

    def _limit(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _receive(self, request: Request, size: int, deadline: float) -> bytes:
        """Return ``size`` bytes of the answer to ``request``."""
        data = b""
        while len(data) < size:
            try:
                self._limit(deadline)
                part, _, flags, _ = self._socket.recvmsg(size - len(data))
            except TimeoutError:
                raise self._error(f"has not answered {request.name} within {self.seconds:g} seconds") from None
            except OSError as error:
                raise self._error(f"has closed the connection ({error.strerror} at {request.name})") from None
            if not part:
                raise self._error(f"has closed the connection at {request.name}")
            if flags & socket.MSG_CTRUNC:  # the kernel has closed them
                raise self._error(f"has sent descriptors in answer to {request.name}")
            data += part
        return data

    def _error(self, what: str) -> DaemonError:
        remedy = "read what the daemon has printed, and start it again"
        return DaemonError(f"the daemon of {self._name} {what}", remedy)

    def ask(self, request: Request, payload: bytes, size: int, *, flags: int = 0, fds: Sequence[int] = ()) -> bytes:
        """Send a request, and return the ``size`` bytes of its answer's payload."""
        deadline = self._until()
        self._send(request, flags, payload, fds, deadline)
        answered, flags, length = _HEADER.unpack(self._receive(request, _HEADER.size, deadline))
        if answered != request or flags & (3 | _REPLY) != _VERSION | _REPLY:
            raise self._error(f"has answered {request.name} with message {answered}, flags {flags:#x}")
        if length != size:
            raise self._error(f"has answered {request.name} with {length} bytes instead of {size}")
        return self._receive(request, size, deadline)

    def order(self, request: Request, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a request without an answer of its own, and wait until it is done where the daemon tells."""
        if not self.acknowledges:
            self._send(request, 0, payload, fds, self._until())
        elif result := _NUMBER.unpack(self.ask(request, payload, _NUMBER.size, flags=_NEED_REPLY, fds=fds))[0]:
            raise self._error(f"has refused {request.name} ({result:#x})")

    def settle(self) -> None:
        """Wait until all requests before are done: a daemon handles them in their order."""
        if not self.acknowledges:
            self.number(Request.GET_FEATURES)

    def check_idle(self) -> None:
        """Check a connection that has become readable while no answer is due."""
        self._socket.settimeout(0)
        try:
            data, _, _, _ = self._socket.recvmsg(1)
        except BlockingIOError:
            return  # it was an answer, which another thread has read
        except OSError as error:
            raise self._error(f"has closed the connection ({error.strerror})") from None
        raise self._error("has sent what nobody asked for" if data else "has closed the connection")

    # --- the requests

    def number(self, request: Request) -> int:
        """Ask for a number of 64 bits."""
        result: int = _NUMBER.unpack(self.ask(request, b"", _NUMBER.size))[0]
        return result

    def set_number(self, request: Request, value: int) -> None:
        """Set a number of 64 bits."""
        self.order(request, _NUMBER.pack(value))

    def set_state(self, request: Request, ring: int, value: int) -> None:
        """Set a number of 32 bits of a ring."""
        self.order(request, _STATE.pack(ring, value))

    def set_file(self, request: Request, ring: int, fd: int) -> None:
        """Give the daemon an eventfd of a ring."""
        self.order(request, _NUMBER.pack(ring), [fd])

    def set_addresses(self, ring: int, descriptors: int, available: int, used: int) -> None:
        """Set where a ring is: guest-physical addresses, see ``SharedRegion.gpa``."""
        self.order(Request.SET_VRING_ADDR, _ADDRESSES.pack(ring, 0, descriptors, used, available, 0))

    def take_ring(self, ring: int) -> int:
        """Stop a ring: the daemon does not access it, nor what is in it, after this. Return the next index."""
        answered, base = _STATE.unpack(self.ask(Request.GET_VRING_BASE, _STATE.pack(ring, 0), _STATE.size))
        if answered != ring or base > 0xFFFF:
            raise self._error(f"has answered GET_VRING_BASE for ring {ring} with ring {answered}, index {base}")
        return int(base)

    def set_table(self, regions: Sequence[SharedRegion]) -> None:
        """Replace the daemon's memory by at most ``MAX_TABLE`` regions."""
        head = _STATE.pack(len(regions), 0)
        payload = head + b"".join(region.packed for region in regions)
        self.order(Request.SET_MEM_TABLE, payload, [region.file for region in regions])

    def add_region(self, region: SharedRegion) -> None:
        """Add a region to the daemon's memory (``CONFIGURE_MEM_SLOTS``)."""
        self.order(Request.ADD_MEM_REG, bytes(8) + region.packed, [region.file])

    def remove_region(self, region: SharedRegion) -> None:
        """Remove a region from the daemon's memory (``CONFIGURE_MEM_SLOTS``)."""
        self.order(Request.REM_MEM_REG, bytes(8) + region.packed)

    def config(self, size: int) -> bytes:
        """Return the first ``size`` bytes of the device's configuration structure (``CONFIG``)."""
        request = _CONFIG.pack(0, size, 0) + bytes(size)
        answer = self.ask(Request.GET_CONFIG, request, len(request))
        if _CONFIG.unpack_from(answer)[:2] != (0, size):
            raise self._error("has answered GET_CONFIG with another part of the configuration")
        return answer[_CONFIG.size :]
