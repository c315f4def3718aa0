"""A process in a session's guest, with the interface of ``subprocess.Popen``."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import GuestDied, GuestError
from kvmpass.guest.frames import CHANGE_DIRECTORY, ERRORS, EXECUTE, OUTPUT
from kvmpass.guest.input import Input
from kvmpass.guest.output import DescriptorSink, OutputWriter
from kvmpass.guest.process import drop, lost
from kvmpass.session.streams import Cancel, InputPipe, InputPump, OutputPipe, ToDescriptor, duplicate, write_to

if TYPE_CHECKING:
    from kvmpass.guest.agent import Agent
    from kvmpass.guest.frames import Payload
    from kvmpass.guest.process import AgentProcess, Receiver

Argument = str | bytes | os.PathLike[str]
Target = int | IO[bytes] | IO[str] | None
"""As for ``subprocess``: a descriptor, a file that has one, ``PIPE``, ``DEVNULL``, ``STDOUT``, or None."""
Death = Callable[[str], GuestDied]
_START_SECONDS = 60.0  # for a guest's fork and exec: an emulated guest that is busy takes seconds
_KILL_SECONDS = 5.0


def words(args: Argument | Sequence[Argument]) -> list[str | bytes]:
    """Return a command's arguments; a single text is the program."""
    if isinstance(args, (str, bytes, os.PathLike)):
        return [os.fspath(args)]
    return [os.fspath(word) for word in args]


class GuestProcess:
    """A process that runs in the guest. Made by ``Session.popen``.

    ``with`` closes its input and waits for it, reading what nobody has read.

    Synchronization: from any thread; each of its files from one thread at a time.
    """

    def __init__(
        self,
        agent: Agent,
        died: Death,
        args: Argument | Sequence[Argument],
        *,
        stdin: Target = None,
        stdout: Target = None,
        stderr: Target = None,
        captured: Receiver | None = None,
        tty: bool | tuple[int, int] = False,
        root: str = "",
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.args = args
        """As given."""
        self.stdin: IO[bytes] | None = None
        """Its input, with ``PIPE``."""
        self.stdout: IO[bytes] | None = None
        """Its output, with ``PIPE``."""
        self.stderr: IO[bytes] | None = None
        """Its errors, with ``PIPE``."""
        # Nothing of these refers back to this object: such a cycle would keep what was captured, up to 256 MiB, until
        # garbage is collected.
        self._agent, self._died = agent, died
        self._targets: dict[int, Receiver] = {}
        self._sent_to: list[ToDescriptor] = []
        self._fds: list[int] = []
        self._cancel = Cancel()
        self._closed = False
        self._lock = threading.Lock()  # of _closed
        self._pump: InputPump | None = None
        self._writer = OutputWriter(partial(_fail, self._sent_to), lambda: False)
        input = Input() if tty or (stdin is not None and stdin != subprocess.DEVNULL) else None
        with undo_on_error(self._release):
            self.stdout = self._target(OUTPUT, stdout, captured, 1)
            merged = stderr == subprocess.STDOUT  # by the guest, which keeps their order
            if not merged:
                self.stderr = self._target(ERRORS, stderr, captured, 2)
            try:
                self._process: AgentProcess = agent.start(
                    words(args),
                    root=root,
                    environment=env,
                    directory=os.fspath(cwd) if cwd is not None else "",
                    input=input,
                    terminal=((24, 80) if tty is True else tty) or None,
                    errors_in_output=merged,
                    receive=partial(_receive, self._targets),
                )
                with undo_on_error(self._process.kill):
                    self._wait_started(words(args)[0], cwd, timeout)
                    if input is not None and stdin == subprocess.PIPE:
                        self.stdin = io.BufferedWriter(InputPipe(agent, input))
                    elif input is not None and stdin is not None and stdin != subprocess.DEVNULL:
                        self._pump = InputPump(os.dup(_fileno(stdin)), input, self._cancel)
            except GuestDied as error:
                raise died(error.reason) from None
            self.input = input
            """What takes its input; None: it is empty."""

    def _wait_started(self, program: str | bytes, cwd: object, timeout: float | None) -> None:
        """Wait until it runs its program.

        Raises the error of why it cannot, with the name of what was not found; ``GuestError`` if a guest that has no
        ``timeout`` does not answer, else ``subprocess.TimeoutExpired``.
        """
        try:
            self._process.wait_started(_START_SECONDS if timeout is None else timeout)
        except TimeoutError as error:
            if self._process.error is error:
                raise
            if timeout is not None:
                raise subprocess.TimeoutExpired(self._shown, timeout) from None
            raise GuestError(
                f"the guest hangs, or is too busy: a command was not started within {_START_SECONDS:g} seconds",
                "look at its console (kvmpass logs), or stop it",
            ) from None
        except OSError as error:
            error.filename = {CHANGE_DIRECTORY: cwd, EXECUTE: program}.get(str(error.filename), error.filename)
            raise

    @property
    def _shown(self) -> list[str]:
        return [os.fsdecode(word) for word in words(self.args)]

    # --- its streams

    def _target(self, stream: int, target: Target, captured: Receiver | None, own: int) -> IO[bytes] | None:
        """Set where an output stream goes; return its pipe if there is one. ``own``: this process's descriptor."""
        if target == subprocess.PIPE and captured is not None:
            self._targets[stream] = captured
        elif target == subprocess.PIPE:
            pipe = OutputPipe(self._agent, self._died)
            self._targets[stream] = pipe
            return io.BufferedReader(pipe)
        elif target == subprocess.DEVNULL:
            self._targets[stream] = drop
        else:
            fd = duplicate(own if target is None else _fileno(target))
            self._fds.append(fd)
            to = ToDescriptor(self._writer, DescriptorSink(fd, partial(_write, fd, self._cancel)))
            self._sent_to.append(to)
            self._targets[stream] = to
        return None

    # --- its end

    @property
    def returncode(self) -> int | None:
        """0 to 255, or -N for signal N; None while it runs, or its output is not complete."""
        return self._process.returncode

    def poll(self) -> int | None:
        """Return ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended and its output is written; return ``returncode``.

        Raises ``subprocess.TimeoutExpired``, ``GuestDied``, and the ``OSError`` of output that could not be written,
        but for a reader that has gone: as with a pipe, that is SIGPIPE for the process. ``GuestError`` if some of the
        output is lost for another reason, as for lack of memory.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            code = self._process.wait(timeout)
            self._writer.close(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if any(to.pending for to in self._sent_to):
                raise TimeoutError
        except TimeoutError:
            raise subprocess.TimeoutExpired(self._shown, timeout or 0.0) from None
        except GuestDied as error:
            self._release()
            raise self._died(error.reason) from None
        self._release()
        failure = self._writer.failure
        if failure is None or isinstance(failure, BrokenPipeError):
            failure = self._process.receive_error
        if failure is not None:
            raise lost(failure)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to its process group; does nothing once it has ended. Raises ``ValueError``."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill its process group."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        self._process.resize(rows, columns)

    def abandon(self) -> None:
        """Kill it, read no more of its input, and write no more of its output: nobody waits for it. Idempotent."""
        self._cancel.set()
        if self.input is not None:
            self.input.drop()  # its writer must not block
        try:
            with suppress(TimeoutError, GuestDied):
                self.kill()
                self._process.wait(_KILL_SECONDS)
        finally:
            self._release()

    def _release(self) -> None:
        """Stop the threads, and close what belongs to it. Idempotent."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self._cancel.set()
        run_all(
            self._writer.close,
            *([self._pump.join] if self._pump else []),
            *(partial(os.close, fd) for fd in self._fds),
            self._cancel.close,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.abandon()
            return
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                file.close()
        self.wait()


def _receive(targets: Mapping[int, Receiver], process: AgentProcess, stream: int, data: Payload) -> None:
    targets[stream](process, stream, data)


def _write(fd: int, cancel: Cancel, data: bytes) -> None:
    write_to(fd, cancel, data)


def _fail(sent_to: Sequence[ToDescriptor]) -> None:
    for to in sent_to:
        to.fail()


def _fileno(target: Target) -> int:
    if isinstance(target, int):
        return target
    assert target is not None
    return target.fileno()
