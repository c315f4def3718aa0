"""A run of a Linux guest in a machine: its serial ports, and how it ended."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvmpass.guest.channel import ControlChannel, Exited, GuestFailure, Ready, SizeWanted
from kvmpass.guest.output import OutputWriter, Sink
from kvmpass.guest.size import ConsoleSize
from kvmpass.machine import Machine
from kvmpass.machine.vcpus import GuestOutcome

CONSOLE, OUTPUT, ERRORS, CONTROL = range(4)  # COM1 to COM4, as the guest's init uses them
_TAIL_BYTES = 1 << 16
_MAX_FAILURES = 64
_ABANDON_SECONDS = 2.0  # for a reader of the output that does not read, when all is over anyway
_POWEROFF_SECONDS = 60.0  # from the command's status to power off; the init script does nothing in between


@dataclass(frozen=True, slots=True)
class GuestResult:
    """How a guest ended. ``status`` is the command's, None if it did not report one.

    ``failures``: what the guest's init could not do, and what KVM could not. ``console``: its last 64 KiB
    (``kvmpass.crash.excerpt`` finds where a crash begins in it).
    """

    outcome: GuestOutcome
    status: int | None
    failures: tuple[str, ...]
    console: str


@dataclass(slots=True)
class _Report:
    status: int | None = None
    ready: bool = False
    failures: list[str] = field(default_factory=list)


class Guest:
    """One run of what was loaded (``GuestImage.load``): connects the serial ports, starts the vCPUs, waits.

    ``console``, ``output`` and ``errors`` get bytes from a thread of this object. ``with`` stops the output thread
    and leaves the serial ports. Raises ``GuestError`` where another guest of this machine has not been left.
    """

    def __init__(self, machine: Machine, *, console: Sink | None, output: Sink, errors: Sink) -> None:
        self._machine = machine
        self._report = _Report()
        self._control = ControlChannel()
        self._size = ConsoleSize(lambda data: machine.serial(CONTROL).push(data))
        self._tail: deque[int] = deque(maxlen=_TAIL_BYTES)
        self._reported = threading.Event()
        self._writer = OutputWriter(machine.stop, lambda: machine.ended)
        to_console = self._writer.to(console) if console else None

        def on_console(data: bytes) -> None:
            self._tail.extend(data)
            if to_console:
                to_console(data)

        try:
            outputs = {
                CONSOLE: on_console,
                OUTPUT: self._writer.to(output),
                ERRORS: self._writer.to(errors),
                CONTROL: self._on_control,
            }
            machine.connect(outputs, self._writer.throttle)
        except BaseException:
            self._writer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._machine.stop()
        self._writer.close(None if error is None else _ABANDON_SECONDS)
        self._machine.disconnect()

    def type(self, data: bytes) -> int:
        """Keystrokes for the console. From any thread. Returns how many bytes the guest has yet to take."""
        return self._machine.serial(CONSOLE).push(data)

    def resize(self, rows: int, columns: int) -> None:
        """The size of the terminal that shows the console, also while the guest runs. From any thread.

        It reaches a guest whose init runs a shell on the console. One that does not ask or does not read gets the
        latest once it does.
        """
        self._size.set(rows, columns)

    def _on_control(self, data: bytes) -> None:
        for event in self._control.feed(data):
            match event:
                case Ready():
                    self._report.ready = True
                case GuestFailure(text) if len(self._report.failures) < _MAX_FAILURES:
                    self._report.failures.append(text)
                case SizeWanted():
                    self._size.asked()
                case Exited(status) if self._report.ready and self._report.status is None:
                    self._report.status = status
                    self._reported.set()

    @property
    def console(self) -> str:
        """What its console has printed so far: the last 64 KiB."""
        return bytes(self._tail).decode(errors="replace").replace("\r", "")

    def run(self, *, restart: bool = False, timeout: float | None = None) -> GuestResult:
        """Start and wait for the end: ``timeout`` seconds at most. Raises what a sink or a vCPU raised.

        ``restart``: a guest that reboots without having reported its command's status starts again, with its devices
        reset. A guest that has reported it is given a minute to power off. The time includes every boot.
        """
        deadline = time.monotonic() + timeout if timeout is not None else math.inf
        self._machine.start()
        outcome = None
        while outcome is None:
            reported = self._reported.is_set()  # before the wait: a report that comes during it starts the minute
            left = deadline - time.monotonic()
            outcome = self._machine.wait(max(0.0, min(_POWEROFF_SECONDS if reported else 1.0, left)))
            if outcome is None and time.monotonic() >= deadline:
                self._machine.stop(GuestOutcome.TIMEOUT)
            elif outcome is None and reported:
                self._machine.stop()
            if outcome is GuestOutcome.REBOOT and restart and not self._reported.is_set():
                self._report.ready = False
                self._machine.reset()
                self._control = ControlChannel()  # a line that the last boot did not end is not this one's
                self._size.forget()
                self._machine.start()
                outcome = None
        self._writer.close()
        if self._writer.failure is not None:
            raise self._writer.failure
        failures = [*self._report.failures, *([self._machine.fault] if self._machine.fault else [])]
        return GuestResult(outcome, self._report.status, tuple(failures), self.console)
