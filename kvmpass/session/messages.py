"""Messages between the process of a guest and those who want something of it, over a socket in its directory.

A message is a JSON object in one packet of a ``SOCK_SEQPACKET`` socket, with descriptors (unix(7)). A client sends a
request, ``{"do": …}``; then ``{"signal": N}`` and ``{"size": [rows, columns]}`` for a command that runs. The answer
is one object, with ``error`` if something failed. If either side ends, the other reads an empty packet.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

MAX_MESSAGE = 128 << 10
"""Bytes of one message."""
MAX_DESCRIPTORS = 3
"""Descriptors with one message."""

_CREDENTIALS = struct.Struct("=3I")  # process, user, group (struct ucred)


class BadMessage(Exception):
    """What was received is no message."""


def send(connection: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message. Raises ``BadMessage`` if it is too large, ``OSError``."""
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise BadMessage(f"a message of {len(data)} bytes, at most {MAX_MESSAGE}")
    socket.send_fds(connection, [data], list(descriptors), socket.MSG_NOSIGNAL)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next message and its descriptors, which belong to the caller; None at the end.

    Raises ``BadMessage``, ``OSError`` (``TimeoutError``).
    """
    data, fds, flags, _ = socket.recv_fds(connection, MAX_MESSAGE + 1, MAX_DESCRIPTORS)
    for fd in fds:  # recv_fds ignores MSG_CMSG_CLOEXEC in Python 3.11
        os.set_inheritable(fd, False)
    try:
        if not data:
            if fds:
                raise BadMessage("an empty message with descriptors")
            return None
        if flags & socket.MSG_TRUNC:
            raise BadMessage("a message that is too large")
        if flags & socket.MSG_CTRUNC:
            raise BadMessage("more descriptors than this process can have")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadMessage("not JSON") from error
        if not isinstance(message, dict):
            raise BadMessage("not an object")
    except BadMessage:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


def peer(connection: socket.socket) -> int:
    """Return the user id of the other side's process, when it connected or listened."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(data)
    return int(user)
