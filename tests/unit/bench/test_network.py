"""The host's side of the network phases."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]
RESET = struct.pack("ii", 1, 0)  # struct linger: close() resets the connection


def test_a_guest_that_was_killed_holds_up_no_other(script: Script) -> None:
    """Of the guests before, one left its connection open, and another's was reset."""
    network = script("network")
    left = threading.Event()

    def handle(connection: socket.socket) -> None:
        if connection.recv(1) == b"r":
            left.set()
        network.take(connection)
        connection.sendall(b"taken")

    with network.serve(0, handle, "127.0.0.1") as server:
        address = server.getsockname()
        with socket.create_connection(address) as silent:
            silent.sendall(b"s")
            with socket.create_connection(address) as reset:
                reset.sendall(b"r")
                assert left.wait(60)
                reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            with socket.create_connection(address, timeout=60) as connection:
                connection.sendall(b"data")
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(5) == b"taken"


def test_a_port_that_is_served_no_more_is_free(script: Script) -> None:
    network = script("network")
    with network.serve(0, network.take, "127.0.0.1") as server:
        address = server.getsockname()
        socket.create_connection(address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
