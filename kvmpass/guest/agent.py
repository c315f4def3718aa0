"""The agent in the guest, and what it runs: the host's side of the protocol of :mod:`kvmpass.guest.frames`.

The guest is not trusted. A frame is checked before it is used; what belongs to no process that runs is ignored; what
violates the protocol ends the connection, and all who wait get ``GuestDied``. What is kept for each process is
limited by what was granted to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from kvmpass.errors import GuestDied, GuestError, KvmpassError
from kvmpass.guest.frames import (
    FAILURE,
    HELLO,
    MAX_PAYLOAD,
    MAX_PROCESSES,
    MAX_START,
    PING,
    PONG,
    POWER_OFF,
    READY,
    START,
    START_HEAD,
    VERSION,
    WITH_ERRORS_IN_OUTPUT,
    WITH_INPUT,
    WITH_TERMINAL,
    BadFrame,
    Frame,
    FrameReader,
    encode,
)
from kvmpass.guest.input import Input
from kvmpass.guest.process import ANSWER_SECONDS, SILENT_SECONDS, WINDOW, AgentProcess, Receiver, not_answering

_MAX_WAITING = 2 * MAX_PROCESSES * MAX_START  # bytes that it has not read: more than all that may be started has
_MAX_FAILURE_TEXT = 512


class Agent:
    """Run processes in the guest. ``send`` sends bytes to the agent, and returns how many wait, if it knows.

    ``on_ready`` is called when it runs processes, ``on_failure`` with the text of a failure of the guest's init,
    ``on_bad_frame`` when the agent has violated the protocol. None must block.

    Synchronization: from any thread. ``changed`` guards all, and is not held while ``send`` or a callback is called.
    ``feed`` is called by one thread at a time, with locks held that ``send`` takes as well.
    """

    def __init__(
        self,
        send: Callable[[bytes], int | None],
        *,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[str], None] = lambda text: None,
        on_bad_frame: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._send = send
        self.changed = threading.Condition()
        """Notified of each change."""
        self.failure: str | None = None
        """Why nothing more is expected of the agent; None as long as it is."""
        self.ready = False
        """Whether it has said that it runs processes."""
        self.uptime: float | None = None
        """The guest's uptime when it has started, in seconds."""
        self.answering = True
        """Whether it answers, as far as ``look`` has found out."""
        self._on_ready, self._on_failure, self._on_bad_frame = on_ready, on_failure, on_bad_frame
        self._reader = FrameReader()
        self._greeted = False
        self._processes: dict[int, AgentProcess] = {}
        self._pings: dict[int, bool] = {}
        self._last = 0
        self._heard = time.monotonic()
        self._asked: float | None = None  # when, if it has said nothing since

    # --- what the agent sends

    def feed(self, data: bytes) -> None:
        """Handle what the agent has written: the output of its port. Ignored after a failure."""
        if self.failure is not None:
            return
        with self.changed:
            self._heard, self._asked, self.answering = time.monotonic(), None, True
        try:
            for frame in self._reader.feed(data):
                self._handle(frame)
        except BadFrame as error:
            self._violated(str(error))

    def _violated(self, what: str) -> None:
        text = f"the guest's agent has violated its protocol: {what}"
        self.fail(text)
        self._on_bad_frame(text)

    def _handle(self, frame: Frame) -> None:
        if not self._greeted:
            if frame.type != HELLO or frame.numbers()[0] != VERSION:
                raise BadFrame("it does not begin with the version")
            self._greeted = True
            self.uptime = frame.numbers()[1] / 1000
        elif frame.process and frame.type != PONG:
            self._handle_process(frame)
        elif frame.type == FAILURE:
            text = bytes(frame.payload[:_MAX_FAILURE_TEXT]).decode("ascii", "replace")
            self._on_failure("".join(c if c.isprintable() else " " for c in text))
        elif frame.type in (READY, PONG):
            first = frame.type == READY and not self.ready
            with self.changed:
                self.ready = self.ready or first
                if frame.type == PONG and frame.process in self._pings:
                    self._pings[frame.process] = True
                self.changed.notify_all()
            if first:
                self._on_ready()

    def _handle_process(self, frame: Frame) -> None:
        with self.changed:
            process = self._processes.get(frame.process)
        if process is not None and process.handle(frame):
            with self.changed:
                self._processes.pop(frame.process, None)
            if process.input is not None:
                process.input.drop()  # the agent's END of it comes once the process is unknown here
            process.end()

    def fail(self, reason: str) -> None:
        """Expect nothing more: all who wait get ``GuestDied``. The first reason counts."""
        with self.changed:
            self.failure = self.failure or reason
            processes = list(self._processes.values())
            self._processes.clear()
            self.changed.notify_all()
        for process in processes:
            if process.input is not None:
                process.input.drop()

    # --- for its users

    def send(self, frames: bytes) -> None:
        """Send frames. An agent that reads nothing, and makes this side send more and more, has failed."""
        if (self._send(frames) or 0) > _MAX_WAITING and self.failure is None:
            self._violated("it does not read")

    def look(self) -> None:
        """Find out whether the agent answers: sets ``answering``. To be called every second or so.

        A ping every ``SILENT_SECONDS``, if nothing else comes from it. One that does not answer is not dead: it may
        answer later.
        """
        with self.changed:
            now = time.monotonic()
            asking = self._asked is None and self.ready and now - self._heard >= SILENT_SECONDS
            if asking:
                self._asked = now
            elif self._asked is not None and now - self._asked >= ANSWER_SECONDS and self.answering:
                self.answering = False
                self.changed.notify_all()
        if asking:
            self.send(encode(0, PING))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the agent runs processes. Raises ``TimeoutError``, ``GuestDied``."""
        self._wait(lambda: self.ready, timeout)

    def start(
        self,
        arguments: Sequence[str | bytes],
        *,
        environment: Mapping[str, str] | None = None,
        directory: str = "",
        root: str = "",
        input: Input | None = None,
        terminal: tuple[int, int] | None = None,
        errors_in_output: bool = False,
        receive: Receiver | None = None,
        on_end: Callable[[AgentProcess], None] = lambda process: None,
        last: bool = False,
    ) -> AgentProcess:
        """Start a process, also before the guest has booted: then it starts once the agent does.

        The first argument is a path, or searched for in the PATH of the process. ``environment`` is added to the
        agent's. ``directory``: where it starts, by default the agent's, or ``/`` in another ``root``. Without
        ``input`` it reads an empty file. ``terminal``: rows and columns of a terminal that is its input, output and
        errors. ``errors_in_output``: both are one stream, as with ``2>&1``. ``receive`` gets its output, and
        ``AgentProcess.grant`` is due once that is consumed; without it ``AgentProcess.read`` returns it. ``on_end``
        is called once it has ended and all of its output has been received; it must not block. ``last``: it may be
        the 65th, for which the agent has room at the guest's end.

        Raises ``GuestError`` while 64 processes run, for more than 1 MiB of arguments and variables, or if the agent
        does not answer; ``KvmpassError`` for a zero byte in one of them; ``GuestDied``.
        """
        flags = (WITH_INPUT if input is not None else 0) | (WITH_TERMINAL if terminal else 0)
        flags |= WITH_ERRORS_IN_OUTPUT if errors_in_output else 0
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        head = START_HEAD.pack(flags, WINDOW, *(terminal or (0, 0)), len(arguments), len(variables))
        payload = head + b"".join(_string(text) for text in (root, directory, *arguments, *variables))
        if not arguments or not arguments[0]:
            raise KvmpassError("an empty command")
        if len(payload) > MAX_START:
            raise GuestError(
                f"the arguments and variables of a command are {len(payload)} bytes, at most {MAX_START}"
            )
        if input is not None:
            input.detach()  # before START: once that is sent, the end may come at any time
        with self.changed:
            if self.failure is not None:
                raise GuestDied(self.failure)
            if not self.answering:
                raise not_answering()
            if len(self._processes) >= (room := MAX_PROCESSES if last else MAX_PROCESSES - 1):
                raise GuestError(f"{room} processes run in the guest: its agent runs no more")
            self._last += 1
            process = AgentProcess(
                self,
                self._last,
                input=input,
                errors=not (terminal or errors_in_output),
                receive=receive,
                on_end=on_end,
            )
            self._processes[process.number] = process
        for at in range(0, len(payload), MAX_PAYLOAD):
            more = at + MAX_PAYLOAD < len(payload)
            self.send(encode(process.number, START, payload[at : at + MAX_PAYLOAD], int(more)))
        if input is not None:
            input.attach(process.number, self.send)
        return process

    def ping(self, timeout: float) -> float:
        """Return the seconds that the agent takes to answer. Raises ``TimeoutError``, ``GuestDied``."""
        started = time.monotonic()
        with self.changed:
            self._last += 1
            token = self._last
            self._pings[token] = False
        try:
            self.send(encode(token, PING))
            self._wait(lambda: self._pings[token], timeout)
        finally:
            with self.changed:
                del self._pings[token]
        return time.monotonic() - started

    def power_off(self) -> None:
        """Let the guest write its page cache to disks, and power off. Whatever runs in it ends without notice."""
        self.send(encode(0, POWER_OFF))

    def _wait(self, condition: Callable[[], bool], timeout: float | None) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: condition() or self.failure is not None, timeout):
                raise TimeoutError(f"the guest's agent does not answer within {timeout:g} seconds")
            if not condition() and self.failure is not None:
                raise GuestDied(self.failure)


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    if b"\0" in data:
        raise KvmpassError("a command's argument cannot contain a zero byte")
    return data + b"\0"
