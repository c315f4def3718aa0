"""Requests to the process of a guest: what ``kvmpass exec``, ``console``, ``stop`` and ``wait`` ask of it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvmpass.errors import GuestError
from kvmpass.session import messages
from kvmpass.session.directory import SOCKET, find


class RequestFailed(GuestError):
    """The guest's process has refused a request, or has ended."""

    def __init__(self, message: str, remedy: str | None = None, exit_status: int = 125) -> None:
        super().__init__(message, remedy)
        self.exit_status = exit_status
        """That of ``kvmpass exec``."""


class Client:
    """A connection to the process of a guest, for one request. ``with`` closes it: what it has started is killed.

    Synchronization: ``notify`` from any thread, and from a signal handler.
    """

    def __init__(self, guest: str, socket: socket.socket) -> None:
        self.guest = guest
        """The guest's name."""
        self._socket = socket

    @classmethod
    @contextlib.contextmanager
    def connect(cls, guest: str) -> Iterator[Client]:
        """Connect to a guest, by name or by the address of a device. Raises ``GuestError``."""
        path = find(guest)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                _connect(connection, path)
            except (FileNotFoundError, ConnectionRefusedError):
                raise GuestError(f"the guest {path.name} is starting or stopping", "try again") from None
            yield cls(path.name, connection)

    def request(self, do: str, descriptors: Sequence[int] = (), **arguments: Any) -> None:
        """Send the request. Raises ``GuestError``."""
        try:
            messages.send(self._socket, {"do": do, **arguments}, descriptors)
        except ConnectionError:
            self.answer()  # it has been refused, or the process has ended: both raise
            raise self._ended() from None
        except messages.BadMessage as error:
            raise GuestError(f"the command is too long: {error}") from error

    def _ended(self) -> RequestFailed:
        return RequestFailed(f"the process of the guest {self.guest} has ended", exit_status=126)

    def notify(self, **message: Any) -> None:
        """Send a signal or a size to the command that runs. Does nothing once it has ended."""
        with contextlib.suppress(OSError):
            messages.send(self._socket, message)

    def leave(self) -> None:
        """Want nothing more: the other side closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def answer(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the answer. Raises ``RequestFailed``, ``TimeoutError`` after ``timeout`` seconds."""
        self._socket.settimeout(timeout)
        try:
            received = messages.receive(self._socket)
        except ConnectionError:
            received = None
        except messages.BadMessage as error:
            raise RequestFailed(f"the process of the guest {self.guest} has answered {error}") from error
        if received is None:
            raise self._ended()
        message, fds = received
        for fd in fds:
            os.close(fd)
        if (error_ := message.get("error")) is not None:
            failed = RequestFailed(str(error_), exit_status=int(message.get("status", 125)))
            failed.__notes__ = [str(hint) for hint in message.get("hints", ())]
            raise failed
        return message


def _connect(connection: socket.socket, directory: Path) -> None:
    """Connect to the socket in ``directory``, whose path may be longer than an address of a socket can be."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{fd}/{SOCKET}")
    finally:
        os.close(fd)
