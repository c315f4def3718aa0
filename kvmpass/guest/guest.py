"""A run of a Linux guest in a machine: its serial and named ports, and how it ended."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kvmpass import crash
from kvmpass._dataclass import dataclass
from kvmpass._teardown import undo_on_error
from kvmpass.errors import GuestError
from kvmpass.guest.agent import Agent
from kvmpass.guest.channel import ControlChannel, Exited, GuestFailure, Ready, SizeRequest
from kvmpass.guest.frames import ERRORS as ERRORS_STREAM
from kvmpass.guest.frames import Payload
from kvmpass.guest.input import Input
from kvmpass.guest.output import OutputWriter, Sink
from kvmpass.guest.process import AgentProcess, lost
from kvmpass.guest.size import ConsoleSize
from kvmpass.initramfs import init
from kvmpass.machine import GuestOutcome, Machine
from kvmpass.timings import Mark, unmarked

if TYPE_CHECKING:
    from kvmpass.guest.copyout import CopyOut
    from kvmpass.guest.extract import CopiedOut

CONSOLE, OUTPUT, ERRORS, CONTROL = range(4)  # COM1 to COM4, as the guest's init uses them
_TAIL_BYTES = 1 << 16
_MAX_FAILURES = 64
_MAX_DETAIL = 200  # characters of a line of the console
_ABANDON_SECONDS = 2.0  # for a reader that does not read, once an exception ends the run
_SIGNALLED = 128  # a shell's status of a command that a signal has ended, without the signal's number
_LAST_SECONDS = 10.0  # for a destination that does not take files, once a session's guest has ended
_POWEROFF_SECONDS = 60.0  # from the end of the command, and of its files, to power off
_CLOSED_SECONDS = 5.0  # from the end of the agent to that of the guest, whose init may end all programs first
_FILES_SECONDS = 60.0  # without any byte of its files, though it may send some
_STOPPED_SECONDS = 5.0  # between two looks at it, a second apart: this process was stopped, and its guest with it


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

    ``console``, ``output`` and ``errors`` are called with bytes from threads of this object. ``interactive``: the
    image's command gets ``input``. ``terminal``: rows and columns of a terminal that the command gets; its errors are
    then part of its output. ``session``: the image has no command, and ``agent`` runs what the caller starts until
    ``power_off``. ``copy_out``: that of the ``GuestSpec``; the files come when the command has ended, or by
    ``power_off``. ``mark`` is called with the name of each stage that has ended: the guest's boot, its command, its
    power off. ``with`` stops the machine, ends the threads and disconnects the serial ports.

    Raises ``KvmpassError`` if files cannot be created there, ``GuestError`` while another guest is connected.

    Synchronization: ``type``, ``resize``, ``input``, ``console`` and ``power_off`` from any thread.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        console: Sink | None,
        output: Sink,
        errors: Sink,
        interactive: bool = False,
        terminal: tuple[int, int] | None = None,
        copy_out: Sequence[str] = (),
        session: bool = False,
        mark: Mark = unmarked,
    ) -> None:
        self._machine = machine
        self._session = session
        self._mark = mark
        self._status: int | None = None
        self._outcome: GuestOutcome | None = None
        self._ready = self._leaving = self._files_due = False
        self._agent_closed: float | None = None  # when its port was closed, if no program has it open
        self._sending_files = False
        self._files_lost: str | None = None  # why files are missing that the guest has sent
        self._files_heard = 0.0  # since when the guest could send files, and sends none
        self._looked = self._resumed = 0.0  # the last look; the last before which this process was stopped
        self._failures: list[str] = []
        self._control = ControlChannel()
        self._size = ConsoleSize(lambda data: machine.serial(CONTROL).push(data))
        self._files: CopyOut | None = None
        if copy_out:
            from kvmpass.guest.copyout import CopyOut
            from kvmpass.guest.destination import Destination

            self._files = CopyOut([*map(Destination.parse, copy_out)])
        self._terminal = terminal
        self.input = Input() if interactive else None
        """The command's input: send to it, and end it. None: it is empty."""
        self.agent: Agent | None = None
        """The agent in the guest: of a session from the start. None: the guest's init runs its command."""
        self._process: AgentProcess | None = None
        self._tail: deque[int] = deque(maxlen=_TAIL_BYTES)
        self._writer = OutputWriter(machine.stop, lambda: machine.ended)
        to_console = self._writer.to(console) if console else None

        def on_console(data: bytes) -> None:
            self._tail.extend(data)
            if to_console:
                to_console(data)

        with undo_on_error(self._writer.close):
            self._to_output, self._to_errors = self._writer.to(output), self._writer.to(errors)
            outputs: dict[int | str, Sink] = {
                CONSOLE: on_console,
                OUTPUT: self._to_output,
                ERRORS: self._to_errors,
                CONTROL: self._on_control,
                init.AGENT_PORT: self._on_agent,
            }
            self._to_files = self._writer.to(self._files) if self._files else None
            machine.connect(outputs, self._writer.throttle)
        self._make_agent()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._machine.stop()
        self._writer.close(_ABANDON_SECONDS if error else _LAST_SECONDS if self._session else None)
        if self._files is not None:
            self._files.close()
        self._machine.disconnect()

    def type(self, data: bytes) -> int:
        """Send keystrokes to the console. Return how many bytes the guest has not read yet."""
        return self._machine.serial(CONSOLE).push(data)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the terminal that shows the console, or that of the command, also while the guest runs.

        A guest whose init runs a shell on the console gets the latest size when its init requests it.
        """
        if self._terminal is None:
            self._size.set(rows, columns)
            return
        self._terminal = rows, columns
        if self._process is not None:
            self._process.resize(rows, columns)

    # --- the command

    def _make_agent(self) -> None:
        port = self._machine.ports.get(init.AGENT_PORT)
        if port is None:
            return
        port.reset()
        self._agent_closed = None
        port.on_open, port.on_close = self._on_agent_opened, self._on_agent_closed
        self.agent = Agent(
            port.sender(),  # threads may still grant to processes of the last boot, by the same numbers
            on_ready=partial(self._mark, "guest's boot"),
            on_failure=self._on_failure,
            on_bad_frame=self._on_bad_frame,
        )

    def _start_command(self) -> None:
        """Let the agent run the image's command, once it is there. Without its port the guest's init does."""
        self._files_due, self._sending_files = self._to_files is not None, False
        if self.agent is None:
            self._make_agent()  # the image may have been loaded since
        if self.agent is None or self._session:
            return
        self._process = self.agent.start(
            init.RUN_COMMAND,
            input=self.input,
            terminal=self._terminal,
            receive=self._on_output,
            on_end=self._on_end,
        )

    def _on_agent(self, data: bytes) -> None:
        if self.agent is not None:
            self.agent.feed(data)

    def _on_agent_opened(self) -> None:
        self._agent_closed = None

    def _on_agent_closed(self) -> None:
        self._agent_closed = time.monotonic()

    def _look(self) -> None:
        """Look at a guest that runs: what does nothing for too long while it could is given up."""
        now = time.monotonic()
        if now - self._looked >= _STOPPED_SECONDS:
            self._resumed = now
        self._looked = now
        if self._session and not self._leaving:
            self._look_at_agent(now)
        self._look_at_files(now)

    def _look_at_agent(self, now: float) -> None:
        """Find out whether the agent answers, and let all who wait for one that has ended get ``GuestDied``.

        Not of one that was told to power off: it ends before the guest has written its page cache. Nor of one that is
        not ready: another program had the port. That an agent is ready may be read later than that it has ended, as
        these come by different queues.
        """
        if self.agent is None:
            return
        self.agent.look()
        closed = self._agent_closed
        if self.agent.ready and closed is not None and now - max(closed, self._resumed) >= _CLOSED_SECONDS:
            self.agent.fail("the agent in the guest has ended")

    def _on_output(self, process: AgentProcess, stream: int, data: Payload) -> None:
        outlet = self._to_errors if stream == ERRORS_STREAM else self._to_output
        outlet(data, process.grant, stream)

    def _on_end(self, process: AgentProcess) -> None:
        """Handle the command's end, with all of its output. Its files are brought out, then the guest powers off."""
        self._mark("command")
        if process.error is not None:
            self._on_failure(f"the command was not started: {process.error}")
        elif (code := process.returncode) is not None:
            self._status = code if code >= 0 else _SIGNALLED - code
        if process.error is not None:
            self._files_due = False
        self.power_off()

    def _on_files(self, process: AgentProcess, stream: int, data: Payload) -> None:
        if stream == ERRORS_STREAM or self._to_files is None:
            process.grant(stream, len(data))
        else:
            if data:
                self._files_heard = time.monotonic()
            self._to_files(data, process.grant, stream)

    def _on_files_end(self, process: AgentProcess) -> None:
        if process.receive_error is not None:
            self._files_lost = str(lost(process.receive_error, "some of the files are lost"))
        self.power_off()

    def power_off(self) -> None:
        """Let the guest send its files, then write its page cache to disks, and power off.

        Called again, files that have not come by then are left out.
        """
        files_due, self._files_due = self._files_due, False
        if self.agent is not None and files_due:
            self._files_heard, self._sending_files = time.monotonic(), True
            try:
                self.agent.start(init.SEND_FILES, receive=self._on_files, on_end=self._on_files_end, last=True)
                return
            except GuestError as error:
                self._on_failure(f"no files were sent: {error}")
        self._sending_files, self._leaving = False, True
        if self.agent is not None:
            self.agent.power_off()

    @property
    def sending_files(self) -> bool:
        """Whether it sends its files, after which it powers off."""
        return self._sending_files

    def _look_at_files(self, now: float) -> None:
        """Let a guest power off that has sent none of its files for too long: its disks have what it has written.

        It cannot send more than a window while their destination stalls, nor anything while this process is stopped.
        """
        if self._to_files is not None and self._to_files.busy:
            self._files_heard = now
        if self._sending_files and now - max(self._files_heard, self._resumed) >= _FILES_SECONDS:
            self._on_failure(f"the guest has sent none of its files for {_FILES_SECONDS:g} seconds")
            self.power_off()

    def _on_failure(self, text: str) -> None:
        if len(self._failures) < _MAX_FAILURES:
            self._failures.append(text)

    def _on_bad_frame(self, text: str) -> None:
        self._on_failure(text)
        self._machine.stop()

    def _on_control(self, data: bytes) -> None:
        for event in self._control.feed(data):
            match event:
                case Ready():
                    if not self._ready:
                        self._mark("guest's boot")
                    self._ready = True
                case GuestFailure(text):
                    self._on_failure(text)
                case SizeRequest():
                    self._size.requested()
                case Exited(status) if self._ready and self._status is None:
                    self._mark("command")
                    self._status, self._leaving = status, True

    def _reason(self, outcome: GuestOutcome) -> str:
        """Return why nothing more is expected of the guest's agent, in one line."""
        details = [*self._failures[:1], self._machine.fault]
        if outcome in (GuestOutcome.PANIC, GuestOutcome.TRIPLE_FAULT):
            lines = self.console.splitlines()
            at = crash.find(lines)
            details.append("" if at is None else lines[at].strip()[:_MAX_DETAIL])
        reason = ": ".join(filter(None, (f"the guest {outcome.value}", *details)))
        return "".join(c if c.isprintable() else " " for c in reason)  # it is shown on terminals

    @property
    def console(self) -> str:
        """The last 64 KiB that the console has printed."""
        return bytes(self._tail).decode(errors="replace").replace("\r", "")

    @property
    def status(self) -> int | None:
        """The command's exit status, 0-255; None: not reported, so far."""
        return self._status

    def run(self, *, restart: bool = False, timeout: float | None = None) -> GuestResult:
        """Start the guest and wait until it has ended, and all of its output is written: ``follow``, ``result``."""
        self.follow(restart=restart, timeout=timeout)
        return self.result()

    def follow(self, *, restart: bool = False, timeout: float | None = None) -> None:
        """Start the guest and wait until it ends, ``timeout`` seconds at most, reboots included.

        ``restart``: on guest reboot before its command's status, reset the machine and start again. A guest that has
        reported the status, and sent its files, or none of them for a minute in which it could, has a minute to power
        off. Raises what a vCPU raised. The machine may be closed after it.
        """
        deadline = time.monotonic() + timeout if timeout is not None else math.inf
        self._start_command()
        self._machine.start()
        outcome = None
        while outcome is None:
            leaving = self._leaving  # before the wait: an end that comes during it starts the minute
            left = deadline - time.monotonic()
            outcome = self._machine.wait(max(0.0, min(_POWEROFF_SECONDS if leaving else 1.0, left)))
            if outcome is None and time.monotonic() >= deadline:
                self._machine.stop(GuestOutcome.TIMEOUT)
            elif outcome is None and leaving:
                self._machine.stop()
            if outcome is None:
                self._look()
            if outcome is GuestOutcome.REBOOT and restart and self._status is None:
                self._ready = False
                self._machine.reset()
                self._control = ControlChannel()  # drops an unfinished line
                self._size.reset()
                if self._files is not None:
                    self._files.reset()
                self._make_agent()
                self._start_command()
                self._machine.start()
                outcome = None
        if self.agent is not None:
            self.agent.fail(self._reason(outcome))
        self._mark("power off" if self._status is not None else "guest")
        self._failures += filter(None, [self._machine.fault])
        self._outcome = outcome

    def result(self, timeout: float | None = None) -> GuestResult:
        """Return how it ended, after ``follow``, once all of its output is written; after ``timeout`` seconds anyway.

        Raises what a sink raised; ``GuestError``, or an ``OSError``, if some of the command's output is lost for
        another reason, as for lack of memory: it was killed then. Raises ``GuestError`` if it was not followed.
        """
        if self._outcome is None:
            raise GuestError("the guest was not run to its end", "use run(), or follow() before result()")
        self._writer.close(timeout)
        if self._writer.failure is not None:
            raise self._writer.failure
        if self._process is not None and self._process.receive_error is not None:
            raise lost(self._process.receive_error)
        stalled = self._to_files is not None and self._to_files.busy
        cause = "the destination has not taken it" if stalled else self._files_lost
        copied = self._files.results(cause) if self._files else ()
        return GuestResult(self._outcome, self._status, tuple(self._failures), self.console, copied)
