"""The guest's agent, run here: its standard input is a socket instead of a port."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from kvmpass.guest.agent import Agent
from kvmpass.initramfs import init

PROGRAM = Path(init.AGENT)


class LocalAgent:
    """An agent that runs, and the host's side of it."""

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        program: Path = PROGRAM,
        takes_pages: bool = True,
    ) -> None:
        own, other = socket.socketpair()
        if not takes_pages:  # splice(2) refuses what appends
            fcntl.fcntl(other, fcntl.F_SETFL, os.O_APPEND)
        self.failures: list[str] = []
        self.sent, self.received = bytearray(), bytearray()
        self._socket = own
        self._lock = threading.Lock()
        self.program = subprocess.Popen([program, *arguments], stdin=other, env=environment or dict(os.environ))
        other.close()
        self.agent = Agent(self.send, on_failure=self.failures.append, on_bad_frame=self.failures.append)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        with self._lock:
            self.sent += data
            try:
                self._socket.sendall(data)
            except OSError:
                self.agent.fail("the agent has ended")

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self.agent.fail("the agent has ended")
                return
            self.received += data
            self.agent.feed(data)

    def close(self) -> int:
        """Let it end, with what it runs, and return its exit status."""
        try:
            groups = Path(f"/proc/{self.program.pid}/task/{self.program.pid}/children").read_text().split()
        except OSError:
            groups = []
        self._socket.shutdown(socket.SHUT_RDWR)
        status = self.program.wait(20)
        for group in groups:  # a guest would have powered off
            with suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)
        self._thread.join(20)
        self._socket.close()
        return status
