"""The lab: commands and shells inside an emulated AMD host."""

from __future__ import annotations

import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from kvmpass.errors import LabError
from kvmpass.lab.cache import Say, log
from kvmpass.lab.channels import Feeder, Writer, writer
from kvmpass.lab.command import TERMINAL
from kvmpass.lab.config import LabConfig, LabResult
from kvmpass.lab.host import BOOT_SECONDS, ERR, FIRST_BOOT_SECONDS, IN, OUT, STATUS, Host
from kvmpass.lab.script import Job, environment

SHELL = ("/bin/bash", "-i")
Attach = Callable[[Host], AbstractContextManager[None]]
"""Connects what a command reads to a host that is up, for as long as the command runs."""


class Lab:
    """An emulated AMD host, started for each command. ``say`` receives progress, a line at a time.

    Synchronization: labs run in parallel, each in one thread, which it blocks; :meth:`stop` and :meth:`cpu_time` may
    be called from any thread.
    """

    def __init__(self, config: LabConfig | None = None, say: Say = log.info) -> None:
        self.config = config or LabConfig()
        self._say = say
        self._host: Host | None = None
        self._stopped = False

    def stop(self) -> None:
        """End the run in another thread, whose ``run`` returns ``silent``; without one it has no effect.

        Synchronization: any thread.
        """
        self._stopped = True
        host = self._host
        if host is not None:
            host.stop()

    def cpu_time(self) -> float | None:
        """Return the seconds of CPU time that the emulator has used, ``None`` if unknown.

        It is unknown with KVM, and while no command runs inside. An idle host under emulation uses some, too: for its
        timers. Synchronization: any thread.
        """
        host = self._host
        return host.cpu_time() if host is not None else None

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: Writer | int | None = None,
        stderr: Writer | int | None = None,
    ) -> LabResult:
        """Run ``command`` inside, as root, and return how it ended.

        ``stdout`` and ``stderr``: binary files or descriptors that output is copied to as it arrives; ``None``: those
        of this process. ``stdin``: a descriptor; ``None``: no input. ``env`` is added to the lab's small environment.
        A host that dies or hangs before the command starts is started once more. Raises ``LabError`` if the host
        cannot be started, and what ``stdout`` or ``stderr`` raise.
        """
        if not command:
            raise LabError("missing command for the lab")
        outputs = {OUT: writer(stdout, sys.stdout), ERR: writer(stderr, sys.stderr)}
        ports = (OUT, ERR, STATUS) if stdin is None else (OUT, ERR, STATUS, IN)
        job = Job(command, cwd or Path.cwd(), environment(env), ports, "null" if stdin is None else "pipe")

        def attach(host: Host) -> AbstractContextManager[None]:
            return nullcontext() if stdin is None else Feeder(stdin, host.port(IN))

        return self._run(job, outputs, attach)

    def _run(self, job: Job, outputs: Mapping[str, Writer], attach: Attach) -> LabResult:
        """Run a job, once more if the host dies before the command starts."""
        self._stopped = False
        result = self._once(job, outputs, attach, FIRST_BOOT_SECONDS)
        out_of_time = self.config.timeout is not None and result.seconds >= self.config.timeout
        if result.started or out_of_time or self._stopped:
            return result
        # Sometimes an emulated host dies or hangs at boot. The command has had no effect yet.
        self._say(f"{result.summary}; its console ended with:")
        for line in result.console_tail.splitlines():
            self._say(f"  | {line}")
        self._say("starting the host once more")
        return self._once(job, outputs, attach, BOOT_SECONDS)

    def _once(self, job: Job, outputs: Mapping[str, Writer], attach: Attach, patience: float) -> LabResult:
        with Host(self.config, self._say) as host:
            host.start(job)
            self._host = host
            if self._stopped:  # while it was being started
                host.stop()
            try:
                host.pump(outputs)
                early = host.boot(patience)
                if early is not None:
                    return early
                with attach(host):
                    return host.wait()
            finally:
                self._host = None

    def shell(self, *, cwd: Path | None = None) -> LabResult:
        """Run a shell inside, on this process's terminal; without a terminal it reads commands from standard input.

        Raises ``LabError`` if the host cannot be started.
        """
        if not sys.stdin.isatty():
            return self.run(SHELL[:1], cwd=cwd, stdin=sys.stdin.fileno())
        source = sys.stdin.fileno()
        size = os.get_terminal_size(source)
        more = {name: os.environ[name] for name in ("TERM", "COLORTERM") if name in os.environ}
        ports, rows_and_columns = (TERMINAL, IN, STATUS), (size.lines, size.columns)
        job = Job(SHELL, cwd or Path.cwd(), environment(more), ports, "tty", rows_and_columns)
        return self._run(job, {TERMINAL: writer(None, sys.stdout)}, lambda host: _terminal(source, host))


@contextmanager
def _terminal(source: int, host: Host) -> Iterator[None]:
    """Connect a terminal to the command's: raw, and with the same size, also when it changes."""

    def resized(number: int, frame: FrameType | None) -> None:
        size = os.get_terminal_size(source)
        with suppress(OSError):
            host.port(IN).send(f"rows {size.lines} cols {size.columns}\n".encode())

    settings, handler = termios.tcgetattr(source), signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(source)
        with Feeder(source, host.port(TERMINAL)):
            yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, settings)
        signal.signal(signal.SIGWINCH, handler)
