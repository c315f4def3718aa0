"""Bytes through assigned network cards: between a guest and its host, and between two guests."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest
from support.inside import (
    GUEST_ADDRESS,
    GUEST_SECONDS,
    HOST_ADDRESS,
    SOAK,
    Job,
    boot,
    command,
    host_interface,
    outcomes,
)

pytestmark = pytest.mark.amdvi(profile="devices", timeout=3600 if SOAK else 300, duration=25)

SIZE = (100 if SOAK else 8) << 20
MEMORY = "512M" if SOAK else "256M"  # what a guest sends or receives is a file in its memory
DOWN, UP = 7001, 7002  # ports: towards the guest, and back
SECOND_ADDRESS = "192.0.2.3"


def set_up(address: str) -> str:
    return f"net=$(ls $device/net); ip addr add {address}/24 dev $net; ip link set $net up\n"


def sender(address: str, port: int) -> str:
    """Sends ``/tmp/data``. A connection that is refused, or that no network carries yet, is tried again."""
    return f"for try in $(seq 60); do nc {address} {port} </tmp/data && break; sleep 1; done\n"


class Peer:
    """Two TCP servers on the host: one sends ``data``, the other keeps the hash of what it receives."""

    def __init__(self, data: bytes) -> None:
        self.received = hashlib.sha256()
        self.size = 0
        self.data = data
        self._servers = [socket.create_server((HOST_ADDRESS, port)) for port in (DOWN, UP)]
        self._threads = [
            threading.Thread(target=work, args=(server,), daemon=True)
            for work, server in zip((self._send, self._receive), self._servers, strict=True)
        ]
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.settimeout(GUEST_SECONDS)
            thread.start()

    def _send(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(GUEST_SECONDS)
            connection.sendall(self.data)

    def _receive(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(GUEST_SECONDS)
            while part := connection.recv(1 << 20):
                self.received.update(part)
                self.size += len(part)

    def close(self) -> None:
        """Wait for what is under way; both sides have ended when the guest has."""
        for thread in self._threads:
            thread.join(10)
        for server in self._servers:
            server.close()


@pytest.fixture
def peer(nic2: str) -> Iterator[Peer]:
    """A card on the same network stays with the host."""
    with host_interface(nic2):
        peer = Peer(os.urandom(SIZE))
        try:
            yield peer
        finally:
            peer.close()


def test_guest_and_host(nic: str, peer: Peer) -> None:
    """The guest receives, says what it received, and sends it back."""
    script = set_up(GUEST_ADDRESS)
    script += f"for try in $(seq 60); do ping -q -c 1 -W 1 {HOST_ADDRESS} >/dev/null && break; done\n"
    script += f"nc {HOST_ADDRESS} {DOWN} </dev/null >/tmp/data; sha256sum </tmp/data\n"
    script += sender(HOST_ADDRESS, UP)
    done = boot([Job("nic", nic, script)], memory=MEMORY)["nic"]
    peer.close()
    sent = hashlib.sha256(peer.data).hexdigest()
    assert done.checked.split()[0] == sent
    assert (peer.size, peer.received.hexdigest()) == (SIZE, sent)


def test_two_guests(nic: str, nic2: str) -> None:
    """Each makes data up, sends it to the other, and says what it sent and what it received."""

    def script(own: str, other: str, mine: int, theirs: int) -> str:
        # The sender ends with its peer's input: that must stay open.
        text = set_up(own) + "mkfifo /tmp/open\n"
        text += f"nc -l -p {mine} <>/tmp/open >/tmp/received & server=$!\n"
        text += f"dd if=/dev/urandom of=/tmp/data bs=1M count={SIZE >> 20} 2>/dev/null; sha256sum </tmp/data\n"
        return text + sender(other, theirs) + "wait $server; sha256sum </tmp/received\n"

    jobs = [
        Job("first", nic, script(GUEST_ADDRESS, SECOND_ADDRESS, DOWN, UP)),
        Job("second", nic2, script(SECOND_ADDRESS, GUEST_ADDRESS, UP, DOWN)),
    ]
    guests = [
        subprocess.Popen(command([job], memory=MEMORY), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for job in jobs
    ]
    hashes = []
    try:
        for job, guest in zip(jobs, guests, strict=True):
            output, _ = guest.communicate(timeout=GUEST_SECONDS)
            assert guest.returncode == 0, output
            hashes.append(re.findall(r"^([0-9a-f]{64}) ", outcomes([job], output)[job.name].checked, re.MULTILINE))
    finally:
        for guest in guests:
            guest.terminate()
            guest.communicate(timeout=60)
    (first_sent, first_received), (second_sent, second_received) = hashes
    assert (second_received, first_received) == (first_sent, second_sent)
    assert first_sent != second_sent
