"""A run of a Linux guest in a machine: its serial and named ports, and how it ended."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

from kvmpass._dataclass import dataclass
from kvmpass._teardown import undo_on_error
from kvmpass.guest.channel import ControlChannel, Exited, GuestFailure, Ready, SizeRequest
from kvmpass.guest.copyout import CopyOut
from kvmpass.guest.destination import Destination
from kvmpass.guest.extract import CopiedOut
from kvmpass.guest.output import OutputWriter, Sink
from kvmpass.guest.size import ConsoleSize
from kvmpass.initramfs import init
from kvmpass.machine import GuestOutcome, Machine
from kvmpass.timings import Mark, unmarked
from kvmpass.virtio import Port

CONSOLE, OUTPUT, ERRORS, CONTROL = range(4)  # COM1 to COM4, as the guest's init uses them
_TAIL_BYTES = 1 << 16
_MAX_FAILURES = 64
_ABANDON_SECONDS = 2.0  # for a reader that does not read, once an exception ends the run
_POWEROFF_SECONDS = 60.0  # from the command's status to power off; the init script does nothing in between


@dataclass(frozen=True, slots=True)
class GuestResult:
    """The result of a guest's run."""

    outcome: GuestOutcome
    """How the guest ended."""
    status: int | None
    """The command's exit status, 0-255; None: not reported."""
    failures: tuple[str, ...]
    """Failures of the guest's init, and of KVM."""
    console: str
    """The last 64 KiB of its console (``kvmpass.crash.excerpt`` finds a crash in it)."""
    copied_out: tuple[CopiedOut, ...] = ()
    """What was brought out, for each of ``Guest``'s ``copy_out``."""


class Guest:
    """Run what ``GuestImage.load`` has loaded, with the machine's serial ports connected.

    ``console``, ``output`` and ``errors`` are called with bytes from a thread of this object. ``with`` stops the
    machine, ends the thread and disconnects the serial ports. ``mark`` is called with the name of each stage that has
    ended: the guest's boot, its command, its power off. ``copy_out``: that of the ``GuestSpec``.
    Raises ``KvmpassError`` if files cannot be created there, ``GuestError`` while another guest is connected.

    Synchronization: ``type``, ``resize`` and ``console`` from any thread.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        console: Sink | None,
        output: Sink,
        errors: Sink,
        copy_out: Sequence[str] = (),
        mark: Mark = unmarked,
    ) -> None:
        self._machine = machine
        self._mark = mark
        self._status: int | None = None
        self._ready = self._acknowledged = False
        self._failures: list[str] = []
        self._controls = {CONTROL: ControlChannel(), init.CONTROL_PORT: ControlChannel()}
        self._size = ConsoleSize(lambda data: machine.serial(CONTROL).push(data))
        self._files = CopyOut([*map(Destination.parse, copy_out)])
        self._tail: deque[int] = deque(maxlen=_TAIL_BYTES)
        self._writer = OutputWriter(machine.stop, lambda: machine.ended, self._take_output)
        to_console = self._writer.to(console) if console else None

        def on_console(data: bytes) -> None:
            self._tail.extend(data)
            if to_console:
                to_console(data)

        with undo_on_error(self._writer.close):
            to_output, to_errors = self._writer.to(output), self._writer.to(errors)
            outputs: dict[int | str, Sink] = {
                CONSOLE: on_console,
                OUTPUT: to_output,
                ERRORS: to_errors,
                CONTROL: partial(self._on_control, CONTROL),
                init.OUTPUT_PORT: to_output,
                init.ERRORS_PORT: to_errors,
                init.CONTROL_PORT: partial(self._on_control, init.CONTROL_PORT),
            }
            outlets = {init.OUTPUT_PORT: to_output, init.ERRORS_PORT: to_errors}
            if copy_out:
                outputs[init.FILES_PORT] = outlets[init.FILES_PORT] = self._writer.to(self._files)
            machine.connect(
                outputs, self._writer.throttle, lambda name: name not in outlets or outlets[name].has_room()
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._machine.stop()
        self._writer.close(None if error is None else _ABANDON_SECONDS)
        self._files.close()
        self._machine.disconnect()

    def type(self, data: bytes) -> int:
        """Send keystrokes to the console. Return how many bytes the guest has not read yet."""
        return self._machine.serial(CONSOLE).push(data)

    @property
    def input(self) -> Port | None:
        """The port of the command's input (``GuestSpec.interactive``): send to it, and end it."""
        return self._machine.ports.get(init.INPUT_PORT)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the terminal that shows the console, also while the guest runs.

        For a guest whose init runs a shell on the console. It gets the latest size when its init requests it.
        """
        self._size.set(rows, columns)

    def _take_output(self) -> bool:
        """Take what named ports have kept in the guest. Return whether some of it is left."""
        left = [port.resume() for port in self._machine.ports.values()]  # each of them
        if not any(left):
            self._acknowledge()
        return any(left)

    def _acknowledge(self) -> None:
        """Tell the guest, once, that all output has been taken: it powers off then."""
        control = self._machine.ports.get(init.CONTROL_PORT)
        if control is not None and self._status is not None and not self._acknowledged:
            self._acknowledged = True
            control.send(b"taken\n")

    def _take_all_output(self) -> None:
        """Take what the guest, which has ended, has written before."""
        while self._take_output() and self._writer.failure is None:
            self._writer.wait_for_change()

    def _on_control(self, channel: int | str, data: bytes) -> None:
        for event in self._controls[channel].feed(data):
            match event:
                case Ready():
                    if not self._ready:
                        self._mark("guest's boot")
                    self._ready = True
                case GuestFailure(text) if len(self._failures) < _MAX_FAILURES:
                    self._failures.append(text)
                case SizeRequest():
                    self._size.requested()
                case Exited(status) if self._ready and self._status is None:
                    self._mark("command")
                    self._status = status
                    if channel == init.CONTROL_PORT:
                        self._take_output()

    @property
    def console(self) -> str:
        """The last 64 KiB that the console has printed."""
        return bytes(self._tail).decode(errors="replace").replace("\r", "")

    def run(self, *, restart: bool = False, timeout: float | None = None) -> GuestResult:
        """Start the guest and wait until it ends, ``timeout`` seconds at most, reboots included.

        ``restart``: on guest reboot before its command's status, reset the machine and start again. A guest that has
        reported the status has a minute to power off. Raises what a sink or a vCPU raised.
        """
        deadline = time.monotonic() + timeout if timeout is not None else math.inf
        self._machine.start()
        outcome = None
        while outcome is None:
            reported = self._status is not None  # before the wait: a report that comes during it starts the minute
            left = deadline - time.monotonic()
            outcome = self._machine.wait(max(0.0, min(_POWEROFF_SECONDS if reported else 1.0, left)))
            if outcome is None and time.monotonic() >= deadline:
                self._machine.stop(GuestOutcome.TIMEOUT)
            elif outcome is None and reported:
                self._machine.stop()
            if outcome is not None:
                self._take_all_output()
            if outcome is GuestOutcome.REBOOT and restart and self._status is None:
                self._ready = False
                self._machine.reset()
                self._controls = {channel: ControlChannel() for channel in self._controls}  # drops unfinished lines
                self._size.reset()
                self._files.reset()
                self._machine.start()
                outcome = None
        self._mark("power off" if self._status is not None else "guest")
        self._writer.close()
        if self._writer.failure is not None:
            raise self._writer.failure
        failures = filter(None, (*self._failures, self._machine.fault))
        return GuestResult(outcome, self._status, tuple(failures), self.console, self._files.results())
