"""A session: a guest that stays, in which commands run until it is stopped."""

from __future__ import annotations

import locale
import os
import shlex
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvmpass._dataclass import replace
from kvmpass._teardown import run_all
from kvmpass.errors import GuestDied, GuestError
from kvmpass.events import DeviceEvent
from kvmpass.guest import CopiedOut, Guest, GuestResult
from kvmpass.guest.agent import Agent
from kvmpass.guest.frames import CHANGE_DIRECTORY, ERRORS, OUTPUT
from kvmpass.initramfs import served
from kvmpass.initramfs.served import Entry
from kvmpass.machine import AssignedDevice, Machine
from kvmpass.session import files
from kvmpass.session.process import Argument, GuestProcess, Target
from kvmpass.session.streams import MAX_CAPTURED, Capture

BOOT_SECONDS = 120.0
"""That a guest has from its start until its agent runs commands: two that boot on one emulated CPU take 42."""
STOP_SECONDS = 10.0
"""That a guest has to power off."""
_MAX_EVENTS = 256


class Session:
    """A guest that runs commands until ``stop``. Made by :func:`start`; ``with`` stops it.

    Its devices are rebound to their drivers by ``stop``, also if the guest has ended before. All methods raise
    ``GuestDied`` once it has ended.

    Synchronization: from any thread, and from many at once; ``stop`` waits for one that runs already.
    """

    def __init__(
        self,
        name: str,
        machine: Machine,
        guest: Guest,
        agent: Agent,
        entry: Entry | None = None,
        *,
        own_init: bool = False,
    ) -> None:
        self.name = name
        """Its name."""
        self.machine = machine
        """Its machine, which it closes."""
        self.devices: tuple[AssignedDevice, ...] = tuple(machine.devices)
        """The devices that it was started with."""
        self._guest, self._agent = guest, agent
        self.entry = entry
        """How programs start in the guest's root; None: in the initramfs itself."""
        self.own_init = own_init
        """Whether its initramfs is the user's own, whose init has the console."""
        self._events: deque[DeviceEvent] = deque(maxlen=_MAX_EVENTS)
        self.event_count = 0
        """Events of its devices so far, those included that are not kept."""
        self._limit: float | None = None
        self._undo = ExitStack()
        self._stopping = threading.Lock()
        self._result: GuestResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"guest {name}", daemon=True)

    def _run(self) -> None:
        try:
            self._guest.follow(timeout=self._limit)
        except BaseException as error:
            self._error = error
        finally:
            self._agent.fail("the guest has ended" if self._error is None else f"the guest has ended: {self._error}")

    def begin(
        self,
        boot_timeout: float = BOOT_SECONDS,
        warn: Callable[[str], None] = lambda line: None,
        timeout: float | None = None,
    ) -> None:
        """Start the guest, and wait until it runs commands; ``warn`` gets a warning. Raises ``GuestDied``.

        ``timeout``: seconds after which the guest is ended, its boot included.
        """
        self._limit = timeout
        self._thread.start()
        try:
            self._agent.wait_ready(boot_timeout)
            self._check_directory(boot_timeout, warn)
        except TimeoutError:
            raise self._died(f"the guest does not run commands after {boot_timeout:g} seconds") from None
        except GuestDied as error:
            raise self._died(error.reason) from None

    def _check_directory(self, timeout: float, warn: Callable[[str], None]) -> None:
        """Let commands start in ``/`` if the guest cannot enter the directory that they should start in.

        The root of this host has directories that only its owner may enter, and that the guest has its own of.
        """
        if self.entry is None:
            return
        directory = self.entry.directory
        process = self._agent.start(["/"], root=served.ROOT, directory=directory)  # no program: nothing is run
        try:
            process.wait_started(timeout)
        except OSError as error:
            if process.error is None:
                raise
            if error.filename == CHANGE_DIRECTORY:
                warn(f"{directory} cannot be entered by the guest: commands start in /")
                self.entry = replace(self.entry, directory="/")

    def own(self, undo: ExitStack) -> None:
        """Take over what ``stop`` undoes."""
        self._undo = undo

    def note(self, event: DeviceEvent) -> None:
        """Keep an event of a device."""
        self._events.append(event)
        self.event_count += 1

    def _died(self, reason: str) -> GuestDied:
        return GuestDied(reason, console=self.console, events=self.events)

    @property
    def console(self) -> str:
        """The last 64 KiB that its console has printed."""
        return self._guest.console

    @property
    def events(self) -> tuple[DeviceEvent, ...]:
        """The latest 256 events of its devices."""
        return tuple(self._events)

    @property
    def uptime(self) -> float | None:
        """The guest's uptime in seconds when its agent had started."""
        return self._agent.uptime

    @property
    def ended(self) -> str | None:
        """Why nothing more can be run, in one line; None while commands can be run."""
        return self._agent.failure

    @property
    def answering(self) -> bool:
        """Whether the guest answers. If not, its agent has said nothing for half a minute, and starts no commands.

        It may answer again: nothing is ended. False once the agent has ended, as beside an init of the user's own.
        """
        return self._agent.answering and self.ended is None

    def ping(self, timeout: float) -> float:
        """Return the seconds that the guest's agent takes to answer, ``timeout`` at most.

        Unlike ``answering`` this asks now. Raises ``TimeoutError``, ``GuestDied``.
        """
        try:
            return self._agent.ping(timeout)
        except GuestDied as error:
            raise self._died(error.reason) from None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the guest has ended, ``timeout`` seconds at most; return whether."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- commands

    def popen(
        self,
        args: Argument | Sequence[Argument],
        *,
        stdin: Target = None,
        stdout: Target = None,
        stderr: Target = None,
        tty: bool | tuple[int, int] = False,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> GuestProcess:
        """Start a process in the guest; up to 64 run at once.

        The streams are those of ``subprocess.Popen``: ``PIPE``, ``DEVNULL``, ``STDOUT`` for ``stderr``, a file, or a
        descriptor; but without ``stdin`` its input is empty. ``tty``: it gets a terminal, of 24 rows and 80 columns
        or of those given; its errors are then part of its output. ``cwd``: by default ``/root``, and with the host's
        root the directory in which this process started the guest, or ``/`` if the guest cannot enter that; in an
        initramfs of the user's own ``/``. ``env`` is added to the guest's environment.

        Raises ``FileNotFoundError``, ``PermissionError`` and the other errors of running a program there;
        ``GuestError`` (64 processes run, or the guest does not answer), ``GuestDied``.
        """
        return self.spawn(args, stdin=stdin, stdout=stdout, stderr=stderr, tty=tty, cwd=cwd, env=env)

    def spawn(
        self,
        args: Argument | Sequence[Argument],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> GuestProcess:
        """Start a process as ``popen`` does, with any of the options of ``GuestProcess``."""
        if self.entry is not None:
            cwd, env = cwd or self.entry.directory, {**self.entry.environment, **(env or {})}
            options["root"] = served.ROOT
        return GuestProcess(self._agent, self._died, args, cwd=cwd, env=env, **options)

    def outside(
        self, args: Sequence[str], *, stdout: Target = subprocess.DEVNULL, timeout: float | None = None
    ) -> GuestProcess:
        """Start a process in the initramfs, whatever the guest's root, without input and errors.

        ``timeout``: seconds that it has to start; then ``subprocess.TimeoutExpired``.
        """
        return GuestProcess(self._agent, self._died, args, stdout=stdout, stderr=subprocess.DEVNULL, timeout=timeout)

    def run(
        self,
        args: Argument | Sequence[Argument],
        *,
        input: bytes | str | None = None,
        capture_output: bool = True,
        stdout: Target = None,
        stderr: Target = None,
        text: bool = False,
        encoding: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command in the guest and return its result: ``subprocess.run``, with output captured by default.

        ``returncode`` is -N for signal N. ``stdout`` and ``stderr`` replace what ``capture_output`` says of them. See
        ``popen`` for the other arguments.

        Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds, when the command was killed;
        ``subprocess.CalledProcessError`` with ``check``; ``GuestError`` for more than 256 MiB of output, or if it is
        not complete; ``OSError`` for output that could not be written to a file; and what ``popen`` raises.
        """
        default = subprocess.PIPE if capture_output else None
        stdout, stderr = default if stdout is None else stdout, default if stderr is None else stderr
        capture = Capture()
        chosen = encoding or (locale.getencoding() if text or isinstance(input, str) else None)
        process = self.spawn(
            args,
            stdin=None if input is None else subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            captured=capture,
            cwd=cwd,
            env=env,
            timeout=timeout,
        )

        def captured(stream: int, target: Target) -> bytes | str | None:
            data = capture.data(stream) if target == subprocess.PIPE else None
            if data is None or not (text or encoding):
                return data
            return data.decode(chosen or "utf-8").replace("\r\n", "\n").replace("\r", "\n")

        try:
            if process.input is not None and input is not None:
                process.input.send(input.encode(chosen or "utf-8") if isinstance(input, str) else input)
                process.input.end()
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            process.abandon()
            error.output, error.stderr = capture.data(OUTPUT), capture.data(ERRORS)
            raise
        except BaseException:
            process.abandon()
            raise
        if capture.full:
            raise GuestError(
                f"the command has written more than {MAX_CAPTURED >> 20} MiB", "write it to a file: stdout="
            )
        result = subprocess.CompletedProcess(args, code, captured(OUTPUT, stdout), captured(ERRORS, stderr))
        if check:
            result.check_returncode()
        return result

    def send_keys(self, data: bytes) -> int:
        """Send keystrokes to the console. Return how many bytes the guest has not read yet."""
        return self._guest.type(data)

    def dmesg(self) -> str:
        """Return the messages of the guest's kernel."""
        return str(self.run(["dmesg"], text=True, encoding="utf-8", check=True).stdout)

    # --- files

    def copy_in(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a file or a directory of this host into the guest; into ``target`` if it ends with a slash.

        Directories above it are created. Raises ``OSError`` for what cannot be read here, ``GuestError`` with what
        the guest says.
        """
        files.copy_in(self, Path(source), target)

    def copy_out(self, source: str, target: str | os.PathLike[str]) -> CopiedOut:
        """Copy a file or a directory of the guest to this host; into ``target`` if it ends with a slash.

        Only regular files and directories are created, and only beneath ``target``; the result says what was left
        out. Raises ``GuestError`` if it is not complete, or larger than ``--copy-out`` allows.
        """
        return files.copy_out(self, source, os.fspath(target))

    # --- the end

    def stop(self, timeout: float = STOP_SECONDS) -> GuestResult:
        """Let the guest power off, end it after ``timeout`` seconds, and rebind its devices to their drivers.

        A guest that still sends files of ``copy_out`` then has as long again to power off without the others, 10
        seconds at most: its disks have what it has written. Idempotent. Raises what rebinding raises,
        and the error that has ended the guest's run.
        """
        with self._stopping:
            try:
                if self._thread.is_alive():
                    self._guest.power_off()
                    self._thread.join(timeout)
                    if self._thread.is_alive() and self._guest.sending_files:
                        self._guest.power_off()
                        self._thread.join(min(timeout, STOP_SECONDS))
            finally:
                undo, self._undo = self._undo, ExitStack()
                run_all(self.machine.stop, self._thread.join, undo.close, failure=self._error)
        if self._error is not None:
            raise self._error
        self._result = self._result or self._guest.result(0.0)
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run_all(self.stop, failure=error)

    def __repr__(self) -> str:
        state = self.ended or ("running" if self.answering else "not answering")
        return f"<Session {shlex.quote(self.name)}, {state}>"
