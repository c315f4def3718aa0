"""A process that the agent runs in the guest."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Callable
from typing import Protocol

from kvmpass._log import Log
from kvmpass.errors import GuestDied, GuestError
from kvmpass.guest.frames import (
    CREDIT,
    DATA,
    END,
    ERRORS,
    EXITED,
    INPUT,
    NUMBERS,
    OUTPUT,
    REFUSED,
    RESIZE,
    SIGNAL,
    STAGES,
    STATUS,
    BadFrame,
    Frame,
    Payload,
    encode,
)
from kvmpass.guest.input import Input

log = Log(__name__)
WINDOW = 1 << 20
"""Bytes of each of its output streams that may be on the way, or kept here unread."""
SILENT_SECONDS = 10.0
"""After which an agent that has said nothing is asked whether it still answers."""
ANSWER_SECONDS = 20.0
"""That it has to answer. It runs before all other programs of the guest: one that is busy answers."""
_GRANT = WINDOW // 2  # granted at once: each grant interrupts the guest
_NOT_RUN = 127  # as a shell says of a program that it does not find
_MAX_SIGNAL = 64

Receiver = Callable[["AgentProcess", int, Payload], None]
"""Called with a process, a stream and what was written to it, without data at its end.

Must not block, nor keep a view. If it raises, that is logged, the process is killed, and the rest is dropped, but for
the ends of its streams.
"""


class Sender(Protocol):
    """What a process sends its frames through."""

    changed: threading.Condition
    failure: str | None
    answering: bool

    def send(self, frames: bytes) -> None:
        """Send frames to the agent."""


class AgentProcess:
    """A process in the guest. Made by ``Agent.start``.

    Synchronization: from any thread; the agent's ``changed`` guards all.
    """

    def __init__(
        self,
        agent: Sender,
        number: int,
        *,
        input: Input | None,
        errors: bool,
        receive: Receiver | None,
        on_end: Callable[[AgentProcess], None],
    ) -> None:
        self._agent = agent
        self.number = number
        """Its number in frames."""
        self.input = input
        """Its input; None: it is empty."""
        self._receive = receive
        self._open = {OUTPUT, ERRORS, STATUS} if errors else {OUTPUT, STATUS}
        self._credit = {OUTPUT: WINDOW, ERRORS: WINDOW, STATUS: NUMBERS.size}
        self._owed = {OUTPUT: 0, ERRORS: 0}
        self._kept = {OUTPUT: bytearray(), ERRORS: bytearray()}
        self._exited: int | None = None
        self.error: OSError | None = None
        """Why its program could not be run; the ``filename`` is what could not be done."""
        self.receive_error: Exception | None = None
        """What its receiver raised first: some of its output is lost."""
        self._on_end = on_end

    # --- what the agent sends

    def handle(self, frame: Frame) -> bool:
        """Handle a frame of this process; return whether it was the last one. Raises ``BadFrame``.

        Called by the agent, without its lock.
        """
        if frame.type == DATA and frame.stream in self._open:
            self._take(frame.stream, frame.payload)
            return False
        if frame.type == CREDIT and frame.stream == INPUT and self.input is not None:
            if not self.input.granted(frame.numbers()[0]):
                raise BadFrame("more input was read than sent")
            return False
        if frame.type == END and frame.stream == INPUT and self.input is not None:
            self.input.drop()
            return False
        with self._agent.changed:
            if frame.type == END:
                self._open.discard(frame.stream)
            elif frame.type == EXITED and self._exited is None:
                self._exited = _returncode(*frame.numbers())
            elif frame.type == REFUSED and self._exited is None:
                number = frame.numbers()[0]
                self.error, self._exited = _os_error(number, STAGES[0]), _NOT_RUN
                self._open.clear()
            self._agent.changed.notify_all()
            ended = self._ended
        if frame.type == END and frame.stream in (OUTPUT, ERRORS) and self._receive is not None:
            self._pass(self._receive, frame.stream, b"")
        return ended

    def _take(self, stream: int, data: Payload) -> None:
        with self._agent.changed:
            self._credit[stream] -= len(data)
            if self._credit[stream] < 0:
                raise BadFrame(f"{-self._credit[stream]} bytes more than were granted")
            if stream == STATUS:
                if len(data) != NUMBERS.size:
                    raise BadFrame(f"a status of {len(data)} bytes")
                stage, number = NUMBERS.unpack(data)
                self.error = _os_error(number, STAGES[stage] if stage < len(STAGES) else STAGES[0])
                return
            if self._receive is None:
                self._kept[stream] += data
                self._agent.changed.notify_all()
                return
        self._pass(self._receive, stream, data)

    def _pass(self, receive: Receiver, stream: int, data: Payload) -> None:
        """Pass output to ``receive``. If that raises, only this process is killed: others' frames follow."""
        if self.receive_error is not None and data:
            drop(self, stream, data)
            return
        try:
            receive(self, stream, data)
        except Exception as error:
            if self.receive_error is not None:
                return
            log.exception("the output of a command in the guest could not be handled: it is killed")
            self.receive_error = error
            self.grant(stream, len(data))
            self.kill()

    def end(self) -> None:
        """Note that its last frame was handled."""
        self._on_end(self)

    # --- for its users

    @property
    def _ended(self) -> bool:
        return self._exited is not None and not self._open

    @property
    def returncode(self) -> int | None:
        """As ``subprocess``'s: 0 to 255, or -N for signal N; None while it runs, or its output is not complete."""
        with self._agent.changed:
            return self._exited if self._ended else None

    def wait_started(self, timeout: float | None = None) -> None:
        """Wait until it runs its program.

        Raises the ``OSError`` of why it cannot, ``TimeoutError``, ``GuestError`` if the agent does not answer
        (``Agent.look``), ``GuestDied``.
        """
        self._wait(lambda: STATUS not in self._open or not self._agent.answering, timeout)
        if self.error is not None:
            raise self.error
        if STATUS in self._open:
            raise not_answering()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended and its output is complete; return ``returncode``.

        What nobody has read counts as output: read it first, as with ``subprocess``. Processes that it has left
        behind may write for 0.3 seconds more. Raises ``TimeoutError``, ``GuestDied``.
        """
        self._wait(lambda: self._ended, timeout)
        assert self._exited is not None
        return self._exited

    def read(self, stream: int = OUTPUT, size: int = WINDOW, timeout: float | None = None) -> bytes:
        """Return at most ``size`` bytes as soon as there are some, nothing at the end of the stream.

        For processes started without ``receive``. Raises ``TimeoutError``, and ``GuestDied`` after the last byte.
        """
        kept = self._kept[stream]
        self._wait(lambda: kept or stream not in self._open, timeout)
        with self._agent.changed:
            data = bytes(kept[:size])
            del kept[: len(data)]
        self.grant(stream, len(data))
        return data

    def _wait(self, condition: Callable[[], object], timeout: float | None) -> None:
        changed = self._agent.changed
        with changed:
            if not changed.wait_for(lambda: condition() or self._agent.failure is not None, timeout):
                raise TimeoutError(f"the process in the guest is not as far after {timeout:g} seconds")
            if not condition() and self._agent.failure is not None:
                raise GuestDied(self._agent.failure)

    def grant(self, stream: int, size: int) -> None:
        """Let it write ``size`` bytes more to a stream: so many of those that ``receive`` got were consumed."""
        with self._agent.changed:
            self._owed[stream] += size
            if self._owed[stream] < _GRANT or stream not in self._open:
                return
            granted, self._owed[stream] = self._owed[stream], 0
            self._credit[stream] += granted
        self._agent.send(encode(self.number, CREDIT, NUMBERS.pack(granted, 0), stream))

    def send_signal(self, number: int) -> None:
        """Send a signal to its process group; does nothing once it has ended. Raises ``ValueError``."""
        if not 0 < number <= _MAX_SIGNAL:
            raise ValueError(f"signal {number}")
        if self._exited is None:
            self._agent.send(encode(self.number, SIGNAL, struct.pack("<I", number)))

    def kill(self) -> None:
        """Kill its process group."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal: it gets SIGWINCH. 0 to 65535 each."""
        if self._exited is None:
            self._agent.send(encode(self.number, RESIZE, struct.pack("<HH", rows, columns)))


def drop(process: AgentProcess, stream: int, data: Payload) -> None:
    """Drop what a process writes: a ``Receiver``."""
    process.grant(stream, len(data))


def lost(error: BaseException, what: str = "some of the command's output is lost") -> BaseException:
    """Return the exception to raise because of ``what``: the cause itself if it is an ``OSError``."""
    if isinstance(error, OSError):
        return error
    made = GuestError(f"{what}: {error!r}")
    made.__cause__ = error
    return made


def not_answering() -> GuestError:
    """Return the error of a guest whose agent does not answer."""
    return GuestError(
        f"the guest does not answer: its agent has said nothing for {SILENT_SECONDS + ANSWER_SECONDS:g} seconds",
        "look at its console (kvmpass logs), and end it if it has hung (kvmpass stop)",
    )


def _returncode(number: int, status: int) -> int:
    if number > _MAX_SIGNAL or status > 255:
        raise BadFrame(f"an end by signal {number}, status {status}")
    return -number if number else status


def _os_error(number: int, stage: str) -> OSError:
    known = number if 0 < number < 4096 else 0
    return OSError(known, os.strerror(known), stage)
