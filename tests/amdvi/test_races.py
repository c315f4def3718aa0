"""Devices come and go from every side at once: assign, deassign, eject, reset, start and close in several threads."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from support.inside import SOAK
from support.living import descriptors
from support.witness import locked_bytes

from kvmpass import host, ports
from kvmpass.errors import KvmpassError
from kvmpass.guest import GuestImage, GuestSpec, prepare
from kvmpass.machine import Machine

pytestmark = pytest.mark.usefixtures("as_without_tests")
SECONDS = 120 if SOAK else 8
LIFETIME = 2.0  # of one machine
JOBS = {"assign", "deassign", "eject", "reset", "start", "audit"}


class Crowd:
    """A machine, and threads that each do one of their jobs after the other until they are told to stop."""

    def __init__(self, image: GuestImage, seed: int) -> None:
        self.machine = Machine(memory="192M")
        image.load(self.machine)
        self.done: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._choose = random.Random(seed)
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def send(self, *jobs: Callable[[], object]) -> None:
        """Another thread with these jobs."""
        thread = threading.Thread(target=self._work, args=jobs, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, *jobs: Callable[[], object]) -> None:
        while not self._ended.is_set():
            job = self._choose.choice(jobs)
            try:
                job()
                self.done[job.__name__ if job.__name__ != "<lambda>" else "assign"] += 1
            except KvmpassError:
                self.done["refused"] += 1  # closed, not started, started, in use, not there: each is an answer
            except OSError as error:
                if error.errno != errno.EBUSY:  # the group is open still, by the other one
                    self.errors.append(error)
            except BaseException as error:
                self.errors.append(error)

    def end(self) -> None:
        """Close the machine under them, then let them go."""
        self.machine.close()
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "somebody waits for somebody"

    # --- the jobs

    def assigning(self, bdf: str) -> Callable[[], object]:
        return lambda: self.machine.assign(bdf)

    def deassign(self) -> None:
        devices = list(self.machine.devices)
        if devices:
            self.machine.deassign(self._choose.choice(devices))

    def eject(self) -> None:
        """As a guest does it, for the first two slots."""
        with self.machine._bus_lock:
            self.machine._board.ports.write(ports.HOTPLUG_BASE + 8, (0b110).to_bytes(4, "little"))

    def start(self) -> None:
        self.machine.start()

    def reset(self) -> None:
        self.machine.reset()

    def audit(self) -> None:
        with self.machine._device_lock:
            if not self.machine._closed:
                self.machine.audit()


def test_devices_are_added_and_removed_from_every_thread(edu: str, edu2: str) -> None:
    """No error and no deadlock, each audit passes, and nothing is left."""
    before, done = descriptors(), Counter[str]()
    image = prepare(GuestSpec(command=("sh", "-c", "while true; do :; done")), [])
    end = time.monotonic() + SECONDS
    with host.borrow(edu, edu2):
        for seed in range(1000):
            if time.monotonic() > end and done.keys() >= JOBS:
                break
            crowd = Crowd(image, seed)
            machine = crowd.machine
            crowd.send(crowd.assigning(edu), crowd.deassign)
            crowd.send(crowd.assigning(edu2), crowd.eject, crowd.audit)
            crowd.send(crowd.start, crowd.reset, crowd.audit)
            time.sleep(LIFETIME)
            crowd.end()
            assert crowd.errors == []
            assert (machine.devices, locked_bytes(), locked_bytes("VmPin")) == ([], 0, 0)
            assert machine.memslots.ledger == [] == machine.domain.ledger
            done += crowd.done
    assert descriptors() == before
