"""Scripts in guests: the test waits for their output, and lets them continue."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvmpass import Session, host
from kvmpass.errors import GuestDied
from kvmpass.events import DeviceEvent
from kvmpass.guest import Guest, GuestImage, GuestResult, GuestSpec, prepare
from kvmpass.kvm.vm import MsiRoute
from kvmpass.machine import Machine
from kvmpass.machine.functions import CONSOLE_SLOT
from kvmpass.virtio import VirtioFunction

FUNCTIONS = """
wait_for() {
    tries=0
    until eval "$1"; do
        tries=$((tries + 1)); [ $tries -lt 600 ] || { echo "never: $1"; exit 1; }; usleep 50000
    done
}
go_on() { read -r word </dev/ttyS0; }
present() { [ -e /sys/bus/pci/devices/0000:00:01.0 ]; }
# The node is there an instant before the disk can be opened (block/genhd.c: device_add_disk).
drive() { set -- /dev/nvme*n1; drive=$1; [ -b "$drive" ] && true 2>/dev/null <"$drive"; }
"""


class Script:
    """A script that runs in a guest, and its output."""

    def __init__(self, machine: Machine, said: bytearray, thread: threading.Thread) -> None:
        self.machine = machine
        self._said, self._thread = said, thread
        self._thread.start()

    @property
    def said(self) -> str:
        return bytes(self._said).decode()

    @property
    def _how(self) -> object:
        """How it ended."""
        return None

    def expect(self, text: str, count: int = 1, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while self.said.count(text) < count:
            assert time.monotonic() < deadline, f"no {text!r} (x{count}) in {self.said!r}"
            assert self._thread.is_alive() or self.said.count(text) >= count, (
                f"the script is over: {self.said!r} {self._how}"
            )
            time.sleep(0.02)


class InSession(Script):
    """A script that runs in a guest that stays, as a process of it."""

    def __init__(self, guest: Session, script: str) -> None:
        words = ["sh", "-c", f"{FUNCTIONS}go_on() {{ read -r word; }}\n{script}"]
        self._process = guest.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        super().__init__(guest.machine, bytearray(), threading.Thread(target=self._read))

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(GuestDied):
            while data := self._process.stdout.read1():  # type: ignore[attr-defined]
                self._said += data

    @property
    def _how(self) -> object:
        return self._process.poll()

    def go_on(self) -> None:
        """Let the script's ``go_on`` return."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"on\n")
        self._process.stdin.flush()

    def end(self, seconds: float = 60) -> int:
        """Its status."""
        status = self._process.wait(seconds)
        self._thread.join(seconds)
        return status


class Running(Script):
    """A guest that runs a script, its command, in a thread of its own."""

    def __init__(self, machine: Machine, guest: Guest, said: bytearray) -> None:
        self._guest = guest
        self._result: GuestResult | None = None
        super().__init__(machine, said, threading.Thread(target=self._run))

    def _run(self) -> None:
        self._result = self._guest.run()

    @property
    def _how(self) -> object:
        return self._result

    def go_on(self) -> None:
        """Let the guest's ``go_on`` return."""
        self._guest.type(b"on\n")

    def end(self, seconds: float = 60) -> GuestResult:
        self._thread.join(seconds)
        assert self._result is not None, "the guest does not end"
        return self._result


def image_for(script: str) -> GuestImage:
    """A guest that runs ``script``, with the drivers of all devices that are bound to vfio-pci."""
    ready = [device.modalias for device in host.Sysfs().devices() if device.driver == "vfio-pci"]
    return prepare(GuestSpec(command=("sh", "-c", FUNCTIONS + script)), ready)


@contextmanager
def running(script: str, *devices: str, events: list[DeviceEvent] | None = None, **options: Any) -> Iterator[Running]:
    """A guest that starts with ``devices``, bound to vfio-pci; ``events`` gets those of the machine."""
    said = bytearray()
    if events is not None:
        options |= {"on_event": events.append, "stop_on_error": False}
    image = image_for(script)
    with (
        Machine(memory="192M", **options) as machine,
        Guest(machine, console=None, output=said.extend, errors=said.extend) as guest,
    ):
        image.load(machine)
        for bdf in devices:
            machine.assign(bdf)
        run = Running(machine, guest, said)
        try:
            yield run
        finally:
            machine.stop()
            run._thread.join(60)


def device_routes(machine: Machine) -> list[MsiRoute]:
    """The routes of messages but for those of the console that a command's guest has."""
    console = machine._board.pci._find(0, CONSOLE_SLOT << 3)
    own = {vector._gsi for vector in console._msix._vectors} if isinstance(console, VirtioFunction) else set()
    return [route for route in machine.routes.msi if route.gsi not in own]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)
