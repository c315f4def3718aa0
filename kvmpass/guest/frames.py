"""The protocol between the host and the agent in the guest, over one port.

A frame is a header and a payload, little endian, of at most ``MAX_FRAME`` bytes; output may have ``MAX_DATA``. The
host numbers the processes that it starts, and the agent forgets a number once it has sent the process's end and the
ends of its streams. What a process writes is sent as far as the host has granted, and its input as far as the agent
has. The agent's side is in C: ``cffi_build/agent/frames.h`` has the same numbers.
"""

from __future__ import annotations

import struct

from kvmpass._dataclass import dataclass

VERSION = 2
"""Of the protocol: the first payload of ``HELLO``."""
MAX_FRAME = 32768
"""Bytes with the header: what Linux copies into one buffer of a port (drivers/char/virtio_console.c)."""
MAX_DATA = 65536
"""Bytes of ``DATA`` from the agent: what a pipe has room for. A port passes pages of a pipe on as they are."""
MAX_START = 1048576
"""Bytes of all payloads of a process's ``START``."""
MAX_PROCESSES = 65
"""That an agent runs at once. The last one is for what ends the guest."""
INPUT_WINDOW = 131072
"""Bytes of a process's input that the agent takes before it grants more."""

START, DATA, END, CREDIT, SIGNAL, RESIZE, PING, POWER_OFF = range(1, 9)
"""Types that the host sends. Of ``START`` the stream says whether more of the payload follows."""
HELLO, FAILURE, READY, EXITED, REFUSED, PONG = range(16, 22)
"""Types that the agent sends, beside ``DATA``, ``END`` and ``CREDIT``. ``HELLO`` comes first, and ``READY`` before
all that belongs to a process. ``EXITED`` has a signal and an exit status, ``REFUSED`` an errno: there is no process.
"""
INPUT, OUTPUT, ERRORS, STATUS = range(4)
"""Streams. The data of ``STATUS`` is a stage and an errno: the process was made, and could not run the program."""
CHANGE_DIRECTORY, EXECUTE = "change directory", "execute"
STAGES = ("set up", "change root", CHANGE_DIRECTORY, EXECUTE)
"""What could not be done, by the stage's number."""

WITH_INPUT, WITH_TERMINAL, WITH_ERRORS_IN_OUTPUT = 1, 2, 4
"""Flags of ``START``."""

_HEADER = struct.Struct("<IIBBH")  # size of the payload, process, type, stream, zero
MAX_PAYLOAD = MAX_FRAME - _HEADER.size
"""Bytes of one frame's payload."""
NUMBERS = struct.Struct("<II")
"""The payload of ``HELLO``, ``EXITED``, ``REFUSED``, ``CREDIT`` and of the data of ``STATUS``."""
START_HEAD = struct.Struct("<IIHHII")
"""The first bytes of ``START``: flags, window, rows, columns, numbers of arguments and of variables.

Strings follow, each with a zero: root, directory, arguments, variables (``NAME=VALUE``).
"""


Payload = bytes | memoryview
_SMALL = 4096  # bytes of a payload that is copied at once


class BadFrame(Exception):
    """The agent has violated the protocol."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that the agent has sent."""

    process: int
    """The number of a process; 0: the agent itself; of ``PONG`` that of the ``PING``."""
    type: int
    """One of the types; unknown ones are possible."""
    stream: int
    """One of the streams; unknown ones are possible."""
    payload: Payload
    """At most ``MAX_DATA`` bytes. What keeps them makes a copy: a view keeps all that the agent wrote with them."""

    def numbers(self) -> tuple[int, int]:
        """Return the two numbers of the payload. Raises ``BadFrame``."""
        if len(self.payload) != NUMBERS.size:
            raise BadFrame(f"{len(self.payload)} bytes in a frame of type {self.type}")
        first, second = NUMBERS.unpack(self.payload)
        return first, second


def encode(process: int, kind: int, payload: Payload = b"", stream: int = 0) -> bytes:
    """Return a frame. ``payload``: at most ``MAX_PAYLOAD`` bytes."""
    return _HEADER.pack(len(payload), process, kind, stream, 0) + payload


class FrameReader:
    """Decode what the agent writes. It keeps less than one frame.

    Synchronization: one thread at a time.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that ``data`` completes. Raises ``BadFrame``: nothing after it can be decoded."""
        data, at, frames = self._rest + data, 0, []
        while len(data) - at >= _HEADER.size:
            size, process, kind, stream, _ = _HEADER.unpack_from(data, at)
            if size > MAX_DATA:
                raise BadFrame(f"a frame of {size} bytes")
            start, at_next = at + _HEADER.size, at + _HEADER.size + size
            if at_next > len(data):
                break
            payload = data[start:at_next] if size < _SMALL else memoryview(data)[start:at_next]
            frames.append(Frame(process, kind, stream, payload))
            at = at_next
        self._rest = data[at:]
        return frames
