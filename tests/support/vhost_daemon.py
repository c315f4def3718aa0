"""A daemon that serves a virtio device over vhost-user, in a thread: by the rules, or rude at a chosen message.

(QEMU, docs/interop/vhost-user.rst. It checks the front end: what the protocol forbids is an ``AssertionError``.)
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvmpass.virtio.device import INDIRECT, VERSION_1
from kvmpass.virtio.vhost_user import (
    CONFIG,
    CONFIGURE_MEM_SLOTS,
    MQ,
    PROTOCOL_FEATURES,
    REPLY_ACK,
    Request,
)

FEATURES = VERSION_1 | INDIRECT | PROTOCOL_FEATURES
PROTOCOL = MQ | REPLY_ACK | CONFIG | CONFIGURE_MEM_SLOTS | 1 << 5  # and one that no front end here has
NUMBERS = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS)
WITH_FILES = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.SET_VRING_KICK, Request.SET_VRING_CALL)

RUDENESS: dict[str, Callable[[bytes], bytes]] = {
    "another request": lambda answer: struct.pack("<I", 99) + answer[4:],
    "no answer's flag": lambda answer: answer[:4] + struct.pack("<I", 1) + answer[8:],
    "another version": lambda answer: answer[:4] + struct.pack("<I", 6) + answer[8:],
    "too long": lambda answer: answer[:8] + struct.pack("<I", len(answer) - 4) + answer[12:] + bytes(8),
    "too short": lambda answer: answer[:8] + struct.pack("<I", 4) + answer[12:16],
    "gigabytes": lambda answer: answer[:8] + b"\xff" * 4 + answer[12:],
    "half of it": lambda answer: answer[: len(answer) // 2],
    "rubbish": lambda answer: b"\xa5" * len(answer),
    "twice": lambda answer: answer * 2,
}
"""What a daemon does to the bytes of an answer. Others: those of ``OTHERS``, and ``any value``."""
OTHERS = ("silent", "close", "files", "refuse")


@dataclass
class Ring:
    """A ring as the front end has set it up."""

    size: int = 0
    base: int = 0
    places: tuple[int, int, int] = (0, 0, 0)
    files: dict[Request, int] = field(default_factory=dict)
    enabled: bool = False
    done: int = 0

    @property
    def live(self) -> bool:
        return Request.SET_VRING_KICK in self.files


class Daemon(threading.Thread):
    """The other end of ``front``. ``rude``: how to treat a request. ``serve``: what a buffer is answered with."""

    def __init__(
        self,
        *,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        queues: int = 4,
        slots: int = 16,
        config: bytes = bytes(64),
        rude: Mapping[Request, str] | None = None,
    ) -> None:
        super().__init__(name="daemon", daemon=True)
        self.front, self._socket = socket.socketpair()
        self._numbers = dict(zip(NUMBERS, (features, protocol, queues, slots), strict=True))
        self.config, self.rude = config, {} if rude is None else rude
        self.requests: list[Request] = []
        self.accepted = self.protocol = 0
        self.table: dict[int, tuple[int, mmap.mmap]] = {}
        self.rings: dict[int, Ring] = {}
        self.error: BaseException | None = None
        self.going = threading.Event()
        """Cleared: it handles no message, and no notification."""
        self.going.set()
        self.served: Callable[[bytes], bytes] = bytes.upper
        self._ended = os.eventfd(0)
        self.start()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        os.close(self._ended)
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        """As SIGKILL does."""
        self.going.set()
        os.eventfd_write(self._ended, 1)
        self.join(20)
        assert not self.is_alive()

    def run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self.error = error
        finally:
            self._socket.close()
            for ring in self.rings.values():
                for fd in ring.files.values():
                    os.close(fd)
            self.rings.clear()
            for _, mapping in self.table.values():
                mapping.close()

    def _loop(self) -> None:
        while True:
            kicks = {ring.files[Request.SET_VRING_KICK]: ring for ring in self.rings.values() if ring.live}
            self.going.wait()
            ready = select.select([self._ended, self._socket, *kicks], [], [])[0]
            if self._ended in ready:
                return
            if not self.going.is_set():
                continue
            if self._socket in ready:
                if not self._message():
                    return
                continue
            for fd in ready:
                assert isinstance(fd, int)
                os.eventfd_read(fd)
                self.process(kicks[fd])

    # --- messages

    def _exactly(self, size: int) -> tuple[bytes, list[int]]:
        data, files = b"", list[int]()
        while len(data) < size:
            part, fds, _, _ = socket.recv_fds(self._socket, size - len(data), 16)
            if not part:
                return b"", files
            data, files = data + part, files + fds
        return data, files

    def _message(self) -> bool:
        """Handle a message; return whether the connection stands."""
        try:
            head, files = self._exactly(12)
        except ConnectionError:
            return False
        if not head:
            return False
        number, flags, size = struct.unpack("<III", head)
        request = Request(number)
        assert flags & 7 == 1, f"{request.name}: flags {flags:#x}"
        payload = self._exactly(size)[0] if size else b""
        assert bool(files) == (request in WITH_FILES) or request is Request.SET_MEM_TABLE, request.name
        self.requests.append(request)
        answer = self._handle(request, payload, files)
        if flags & 8:
            assert self.protocol & REPLY_ACK
            answer = struct.pack("<Q", 0) if answer is None else answer
        how = self.rude.get(request, "")
        if how == "close":
            return False
        if how == "refuse" and flags & 8 and request is not Request.GET_VRING_BASE:
            answer = struct.pack("<Q", 1)
        if how == "any value" and answer is not None:
            answer = os.urandom(len(answer))
        if answer is not None and how != "silent":
            message = struct.pack("<III", request, 5, len(answer)) + answer
            message = RUDENESS[how](message) if how in RUDENESS else message
            try:
                socket.send_fds(self._socket, [message], [self._ended] if how == "files" else [])
            except OSError:
                return False
        return True

    def _handle(self, request: Request, payload: bytes, files: Sequence[int]) -> bytes | None:
        if request in NUMBERS:
            if request is Request.GET_QUEUE_NUM:
                assert self.protocol & MQ
            if request is Request.GET_MAX_MEM_SLOTS:
                assert self.protocol & CONFIGURE_MEM_SLOTS
            return struct.pack("<Q", self._numbers[request])
        match request:
            case Request.SET_FEATURES:
                (self.accepted,) = struct.unpack("<Q", payload)
                assert not self.accepted & ~self._numbers[Request.GET_FEATURES], "nobody offered that"
            case Request.SET_PROTOCOL_FEATURES:
                (self.protocol,) = struct.unpack("<Q", payload)
                assert not self.protocol & ~self._numbers[Request.GET_PROTOCOL_FEATURES]
            case Request.SET_OWNER:
                assert not payload
            case Request.SET_MEM_TABLE:
                assert not self.protocol & CONFIGURE_MEM_SLOTS
                count, _ = struct.unpack_from("<II", payload)
                assert (count, len(payload)) == (len(files), 8 + 32 * count)
                assert count <= 8
                for gpa in list(self.table):  # rings may be in what comes again
                    self.table.pop(gpa)[1].close()
                for at, fd in enumerate(files):
                    self._map(payload[8 + 32 * at :], fd)
            case Request.ADD_MEM_REG:
                assert self.protocol & CONFIGURE_MEM_SLOTS
                self._map(payload[8:], files[0])
                assert len(self.table) <= self._numbers[Request.GET_MAX_MEM_SLOTS]
            case Request.REM_MEM_REG:
                gpa, size = struct.unpack_from("<QQ", payload, 8)
                assert self.table[gpa][0] == size
                self._unmap(gpa)
            case Request.GET_CONFIG:
                offset, size, _ = struct.unpack_from("<III", payload)
                return payload[:12] + self.config[offset : offset + size]
            case Request.SET_VRING_ADDR:
                number, flags, descriptors, used, available, log = struct.unpack("<IIQQQQ", payload)
                assert (flags, log) == (0, 0)
                self.ring(number).places = descriptors, available, used
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL:
                (value,) = struct.unpack("<Q", payload)
                old = self.ring(value).files.pop(request, -1)
                if old >= 0:
                    os.close(old)
                self.ring(value).files[request] = files[0]
                if request is Request.SET_VRING_KICK:
                    assert Request.SET_VRING_CALL in self.ring(value).files, "it could not signal"
            case _:
                return self._handle_state(request, *struct.unpack("<II", payload))
        return None

    def _handle_state(self, request: Request, number: int, value: int) -> bytes | None:
        ring = self.ring(number)
        match request:
            case Request.SET_VRING_NUM:
                ring.size = value
            case Request.SET_VRING_BASE:
                ring.base = ring.done = value
            case Request.SET_VRING_ENABLE:
                assert self.accepted & PROTOCOL_FEATURES
                ring.enabled = bool(value)
            case Request.GET_VRING_BASE:
                assert ring.live
                assert not ring.enabled or not self.accepted & PROTOCOL_FEATURES
                for fd in ring.files.values():
                    os.close(fd)
                del self.rings[number]
                return struct.pack("<II", number, ring.base)
            case _:
                raise AssertionError(request)
        return None

    def ring(self, number: int) -> Ring:
        assert number < self._numbers[Request.GET_QUEUE_NUM]
        return self.rings.setdefault(number, Ring())

    # --- memory and rings

    def _map(self, region: bytes, fd: int) -> None:
        gpa, size, user, offset = struct.unpack_from("<QQQQ", region)
        assert user == gpa
        assert all(gpa + size <= other or other + there[0] <= gpa for other, there in self.table.items())
        self.table[gpa] = size, mmap.mmap(fd, size, offset=offset)
        os.close(fd)

    def _unmap(self, gpa: int) -> None:
        for ring in self.rings.values():
            assert not any(gpa <= place < gpa + self.table[gpa][0] for place in ring.places), "a ring is in it"
        self.table.pop(gpa)[1].close()

    def access(self, address: int, size: int, data: bytes | None = None) -> bytes:
        """Read guest memory, or write ``data`` to it."""
        gpa, (_, mapping) = next((at, there) for at, there in self.table.items() if at <= address < at + there[0])
        at = address - gpa
        if data is not None:
            mapping[at : at + len(data)] = data
        return mapping[at : at + size]

    def process(self, ring: Ring) -> None:
        """Answer each chain of a buffer to read, and one to write, as far as there are."""
        if not ring.enabled and self.accepted & PROTOCOL_FEATURES:
            return
        table, available, used = ring.places
        (added,) = struct.unpack("<H", self.access(available + 2, 2))
        if ring.base == added:
            return
        while ring.base != added:
            (head,) = struct.unpack("<H", self.access(available + 4 + 2 * (ring.base % ring.size), 2))
            address, length, flags, following = struct.unpack("<QIHH", self.access(table + 16 * head, 16))
            answer = self.served(self.access(address, length))
            if flags & 1:
                address, room, _, _ = struct.unpack("<QIHH", self.access(table + 16 * following, 16))
                self.access(address, 0, answer[:room])
            entry = struct.pack("<II", head, len(answer))
            self.access(used + 4 + 8 * (ring.done % ring.size), 0, entry)
            ring.base, ring.done = (ring.base + 1) & 0xFFFF, (ring.done + 1) & 0xFFFF
            self.access(used + 2, 0, struct.pack("<H", ring.done))
        os.eventfd_write(ring.files[Request.SET_VRING_CALL], 1)
