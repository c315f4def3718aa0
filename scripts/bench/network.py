"""The host's side of a guest's network: the second card, with a port that takes bytes and one that has some."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from samples import Bench

UP_MIB, DOWN_MIB = 4, 48
"""MiB that take some seconds: the times of transfers that take 0.3 s differ by a factor of two."""
HOST_ADDRESS, GUEST_ADDRESS = "192.0.2.1", "192.0.2.2"  # RFC 5737
DOWN, UP = 7001, 7002
SECONDS = 120
"""Of a guest, at most."""


def has_network(bench: Bench) -> bool:
    """Whether there is a card for the guest, and one on the same network that stays with the host."""
    return {"nic", "nic2"} <= bench.devices.keys()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until a condition holds. Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while not _holds(condition):
        if time.monotonic() > deadline:
            raise TimeoutError("what the benchmark waits for has not come")
        time.sleep(0.02)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except OSError:
        return False


@contextmanager
def serve(port: int, handle: Callable[[socket.socket], None], address: str = HOST_ADDRESS) -> Iterator[socket.socket]:
    """Let a thread answer each connection to a port: that of a guest that was killed stays open."""

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # its guest has ended
            connection.settimeout(SECONDS)
            handle(connection)

    def work() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # shut down
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server((address, port)) as server:
        threading.Thread(target=work, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown(socket.SHUT_RDWR)  # a close alone would wake no thread that accepts


def take(connection: socket.socket) -> None:
    """Receive until the peer has sent everything."""
    while connection.recv(1 << 20):
        pass


@contextmanager
def network(bench: Bench) -> Iterator[None]:
    """Serve the second card's network: one port takes bytes, the other has some."""
    if not has_network(bench):
        bench.samples.lack("network", "needs two cards on one network, KVMPASS_TEST_NIC and KVMPASS_TEST_NIC2")
        yield
        return
    place = Path("/sys/bus/pci/devices", bench.devices["nic2"], "net")
    wait_for(lambda: any(place.iterdir()))
    [name] = [path.name for path in place.iterdir()]
    subprocess.run(["ip", "addr", "replace", f"{HOST_ADDRESS}/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    try:
        data = bytes(DOWN_MIB << 20)
        with serve(UP, take), serve(DOWN, lambda connection: connection.sendall(data)):
            yield
    finally:
        subprocess.run(["ip", "addr", "del", f"{HOST_ADDRESS}/24", "dev", name], check=True)
