"""A FUSE client that speaks to a daemon by vhost-user, without any guest: as hostile as one likes.

Sources: include/uapi/linux/fuse.h; Virtual I/O Device 1.2, sections 2.7 (rings) and 5.11 (file system).
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from types import TracebackType
from typing import Self

from kvmpass.virtio.vhost_user import PROTOCOL_FEATURES, REPLY_ACK, Connection, Request, SharedRegion

VERSION_1 = 1 << 32
SIZE = 1 << 20
ROOT = 1  # FUSE_ROOT_ID

LOOKUP, GETATTR, SETATTR, READLINK, SYMLINK = 1, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE = 8, 9, 10, 11, 12, 13, 14, 15, 16
SETXATTR, REMOVEXATTR, INIT, OPENDIR, READDIR = 21, 24, 26, 27, 28
SUBMOUNTS = 1 << 27  # of INIT
CREATE, IOCTL, FALLOCATE, RENAME2 = 35, 39, 43, 45

_ENTRIES = 16
_RINGS = {0: 0x0000, 1: 0x1000}  # where a queue's ring is: descriptors, available at +0x400, used at +0x800
_REQUEST, _ANSWER = 0x10000, 0x40000


class Gone(Exception):
    """The daemon has closed the connection, or answers no longer."""


class FuseClient:
    """A mounted file system, if ``init`` is called; queue 1 has the requests. It takes over ``connection``."""

    def __init__(self, connection: socket.socket, seconds: float = 10.0) -> None:
        self.file = os.memfd_create("guest")
        os.ftruncate(self.file, SIZE)
        self.memory = mmap.mmap(self.file, SIZE)
        self.seconds = seconds
        self.talk = Connection(connection, "test", seconds)
        self.kicks = {ring: os.eventfd(0) for ring in _RINGS}
        self.calls = {ring: os.eventfd(0, os.EFD_NONBLOCK) for ring in _RINGS}
        self._added = dict.fromkeys(_RINGS, 0)
        self._unique = 0
        self._connect()

    def _connect(self) -> None:
        talk = self.talk
        features = talk.number(Request.GET_FEATURES)
        if features & PROTOCOL_FEATURES:
            protocol = talk.number(Request.GET_PROTOCOL_FEATURES) & REPLY_ACK
            talk.set_number(Request.SET_PROTOCOL_FEATURES, protocol)
            talk.acknowledges = bool(protocol)
        talk.order(Request.SET_OWNER, b"")
        talk.set_number(Request.SET_FEATURES, features & (VERSION_1 | PROTOCOL_FEATURES))
        talk.set_table([SharedRegion(0, SIZE, 0, self.file)])
        for ring, place in _RINGS.items():
            talk.set_state(Request.SET_VRING_NUM, ring, _ENTRIES)
            talk.set_state(Request.SET_VRING_BASE, ring, 0)
            talk.set_addresses(ring, place, place + 0x400, place + 0x800)
            talk.set_file(Request.SET_VRING_KICK, ring, self.kicks[ring])
            talk.set_file(Request.SET_VRING_CALL, ring, self.calls[ring])
            talk.set_state(Request.SET_VRING_ENABLE, ring, 1)
        talk.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.talk.close()
        self.memory.close()
        for fd in (self.file, *self.kicks.values(), *self.calls.values()):
            os.close(fd)

    # --- the ring

    def descriptor(self, ring: int, number: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor: whatever it is."""
        struct.pack_into("<QIHH", self.memory, _RINGS[ring] + 16 * number, address, size, flags, following)

    def offer(self, ring: int, head: int, index: int | None = None) -> None:
        """Make the chain at ``head`` available, and kick; ``index`` instead of the next one."""
        place = _RINGS[ring] + 0x400
        struct.pack_into("<H", self.memory, place + 4 + 2 * (self._added[ring] % _ENTRIES), head)
        self._added[ring] = (self._added[ring] + 1 if index is None else index) & 0xFFFF
        struct.pack_into("<H", self.memory, place + 2, self._added[ring])
        os.eventfd_write(self.kicks[ring], 1)

    def used(self, ring: int) -> int:
        """The index of the used ring."""
        return int(struct.unpack_from("<H", self.memory, _RINGS[ring] + 0x802)[0])

    def exchange(self, data: bytes, size: int = 8192, ring: int = 1) -> bytes:
        """Send ``data``, and return what was written into ``size`` bytes. Raises ``Gone``."""
        self.memory[_REQUEST : _REQUEST + len(data)] = data
        self.memory[_ANSWER : _ANSWER + size] = bytes(size)
        self.descriptor(ring, 0, _REQUEST, len(data), 1, 1)
        self.descriptor(ring, 1, _ANSWER, size, 2)
        self.offer(ring, 0)
        while self.used(ring) != self._added[ring]:
            ready, _, _ = select.select([self.calls[ring], self.talk], [], [], self.seconds)
            if self.calls[ring] not in ready:
                raise Gone("it has closed the connection" if ready else "no answer")
            os.eventfd_read(self.calls[ring])
        return self.memory[_ANSWER : _ANSWER + size]

    # --- FUSE

    def request(self, opcode: int, node: int, payload: bytes = b"", size: int = 8192) -> tuple[int, bytes]:
        """Send a request; return its errno, 0 without an error, and its answer."""
        self._unique += 1
        header = struct.pack("<IIQQIIII", 40 + len(payload), opcode, self._unique, node, 0, 0, 1, 0)
        answer = self.exchange(header + payload, size)
        length, error, unique = struct.unpack_from("<IiQ", answer)
        assert unique == self._unique, (opcode, length, error)
        return -error, answer[16:length]

    def init(self, flags: int = 0) -> None:
        """Mount: nothing else is answered before. ``flags``: what the client can, FUSE_* of fuse.h."""
        error, _ = self.request(INIT, 0, struct.pack("<IIII", 7, 31, 0, flags))
        assert error == 0

    def lookup(self, node: int, name: str) -> tuple[int, int]:
        """Return the errno and the node of a name in a directory."""
        error, data = self.request(LOOKUP, node, name.encode() + b"\0")
        return error, struct.unpack_from("<Q", data)[0] if not error else 0

    def find(self, path: str, start: int = ROOT) -> int:
        """Return the node of a path. Raises ``OSError``."""
        node = start
        for name in path.split("/"):
            error, node = self.lookup(node, name)
            if error:
                raise OSError(error, os.strerror(error), path)
        return node

    def open(self, node: int, flags: int, opcode: int = OPEN) -> tuple[int, int]:
        """Return the errno and the handle of an opened file."""
        error, data = self.request(opcode, node, struct.pack("<II", flags, 0))
        return error, struct.unpack_from("<Q", data)[0] if not error else 0

    def read(self, node: int, handle: int, size: int = 4096) -> tuple[int, bytes]:
        """Read from the start of a file."""
        return self.request(READ, node, struct.pack("<QQIIQII", handle, 0, size, 0, 0, 0, 0))

    def content(self, path: str) -> bytes:
        """Return the first 4 KiB of a file. Raises ``OSError``."""
        node = self.find(path)
        error, handle = self.open(node, os.O_RDONLY)
        if not error:
            error, data = self.read(node, handle)
        if error:
            raise OSError(error, os.strerror(error), path)
        return data

    def names(self, path: str) -> set[str]:
        """Return the names in a directory. Raises ``OSError``."""
        node = self.find(path) if path else ROOT
        error, handle = self.open(node, os.O_RDONLY, OPENDIR)
        payload = struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0)
        error, data = (error, b"") if error else self.request(READDIR, node, payload)
        if error:
            raise OSError(error, os.strerror(error), path)
        found, at = set(), 0
        while at < len(data):
            length = struct.unpack_from("<I", data, at + 16)[0]
            found.add(data[at + 24 : at + 24 + length].decode())
            at += 24 + -(-length // 8) * 8
        return found
