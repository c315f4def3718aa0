"""A Linux guest in a machine: which kernel and root file system it gets, its channels, and how it ended."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmpass.boot.cmdline import kernel_command_line
from kvmpass.boot.linux import KernelImage
from kvmpass.errors import BadKernel, NotEnoughMemory
from kvmpass.guest.channel import ControlChannel, Exited, GuestFailure, Ready, SizeWanted
from kvmpass.guest.size import ConsoleSize
from kvmpass.initramfs import GuestRoot, parameters
from kvmpass.layout import MIB
from kvmpass.machine import Machine
from kvmpass.machine.vcpus import Ending

CONSOLE, OUTPUT, ERRORS, CONTROL = range(4)  # COM1 to COM4, as the guest's init uses them
_TAIL_BYTES = 1 << 16
_START = 8 * MIB  # what a kernel allocates before it unpacks: Debian's 6.1 panics with 3 MiB, and works with 5
_SLACK = 32 * MIB  # beyond the least, in advice
_MAX_FAILURES = 64
_ABANDON_SECONDS = 2.0  # for a reader of the output that does not read, when all is over anyway
_POWEROFF_SECONDS = 60.0  # from the command's status to power off; the init script does nothing in between

Sink = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """What to boot. Without ``kernel`` the host's own, without ``initrd`` one made for the devices' modaliases.

    ``command``: argument list to run instead of a shell on the console; it needs the made initramfs.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    copy: tuple[str, ...] = ()
    modules: tuple[Path, ...] = ()
    command: tuple[str, ...] | None = None
    verbose: bool = False
    terminal: str = "linux"
    terminal_size: tuple[int, int] = (24, 80)


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A checked kernel, its initramfs and its command line: nothing of the host has been touched for it."""

    kernel: KernelImage
    initrd: bytes
    cmdline: str
    unpacked: int = 0
    """Bytes of memory that the initramfs takes in the guest once it is unpacked; 0: unknown."""
    warnings: tuple[str, ...] = ()
    """What could not be copied as it should be."""

    @property
    def needed(self) -> int:
        """Bytes of memory without which the kernel cannot start, or cannot unpack the initramfs.

        It runs at its preferred address or above, and takes ``init_size`` from there on before it looks at its memory
        (Documentation/arch/x86/boot.rst). It unpacks into a tmpfs, which takes half of the memory beside the kernel
        and the archive (``shmem_default_max_blocks``, mm/shmem.c;
        Documentation/filesystems/ramfs-rootfs-initramfs.rst).
        """
        return self.kernel.init_size + max(self._before_files, self._for_files)

    @property
    def _before_files(self) -> int:
        return self.kernel.preferred + _START

    @property
    def _for_files(self) -> int:
        return 2 * self.unpacked + len(self.initrd)

    def load(self, machine: Machine) -> None:
        """Into the memory of a machine that has not started. Raises ``NotEnoughMemory`` if it does not fit."""
        if machine.memory.ram_size < self.needed:
            least = -(-(self.needed + _SLACK) // (16 * MIB)) * 16
            what, more = f"the guest's kernel takes {self.needed / MIB:.0f} MiB to start", ""
            if self.unpacked and self._for_files > self._before_files:
                files = f"the guest's files take {self.unpacked / MIB:.0f} MiB unpacked"
                what, more = f"{files}, and half of its memory may hold files", ", or copy less into it"
            raise NotEnoughMemory(
                f"{what}: {machine.memory.ram_size // MIB} MiB are too little",
                f"give the guest {least} MiB (--memory {least}M){more}",
            )
        machine.load_linux(self.kernel, self.initrd, self.cmdline)


@dataclass(frozen=True, slots=True)
class GuestResult:
    """How a guest ended. ``status`` is the command's, None if it did not report one.

    ``failures``: what the guest's init could not do, and what KVM could not. ``console``: its last 64 KiB
    (``kvmpass.crash.excerpt`` finds where a crash begins in it).
    """

    ending: Ending
    status: int | None
    failures: tuple[str, ...]
    console: str


def host_kernel() -> Path:
    """The kernel this host runs, where Debian puts it. Raises ``BadKernel`` if it is not there."""
    path = Path("/boot") / f"vmlinuz-{os.uname().release}"
    if not path.exists():
        raise BadKernel(f"the running kernel's image {path} is not there", "name a bzImage with --kernel")
    return path


def prepare(spec: GuestSpec, modaliases: Sequence[str]) -> GuestImage:
    """Read the kernel and make or read the initramfs. Raises ``BadKernel``, ``KvmpassError`` or ``OSError``."""
    kernel = KernelImage.from_file(spec.kernel or host_kernel())
    append = parameters.words(spec.append)
    unpacked, warnings = 0, tuple[str, ...]()
    if spec.initrd is not None:
        initrd = spec.initrd.read_bytes()
    else:
        root = GuestRoot()
        release = kernel.release or os.uname().release
        root.add_modules(release, modaliases, files=spec.modules, parameters=parameters.module_parameters(append))
        for copy in spec.copy:
            root.copy(copy)
        if spec.command is not None:
            root.run_command(spec.command)
        root.terminal(spec.terminal, spec.terminal_size)
        initrd = root.build()
        unpacked, warnings = root.tree.unpacked_size, tuple(root.warnings)
    command_line = kernel_command_line(verbose=spec.verbose, strict=spec.command is not None, extra=append)
    return GuestImage(kernel, initrd, command_line, unpacked, warnings)


class Pump:
    """Writes what the guest's serial ports send in larger pieces, from a thread of its own.

    The sinks take everything at once; a guest that sends more than ``PENDING_LIMIT`` bytes ahead of a slow reader is
    held up by ``pace``, as at a slow line, until ``stopped`` says that nobody waits for it any more. ``failure`` is
    what a sink raised.
    """

    PENDING_LIMIT = 1 << 20

    def __init__(self, on_failure: Callable[[], None], stopped: Callable[[], bool]) -> None:
        self._pending: dict[Sink, bytearray] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._full = False
        self._on_failure = on_failure
        self._stopped = stopped
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def to(self, sink: Sink) -> Sink:
        """A sink that hands over to ``sink`` later."""

        def put(data: bytes) -> None:
            with self._changed:
                if not self._given_up():
                    pending = self._pending.setdefault(sink, bytearray())
                    pending.extend(data)
                    self._full = self._full or len(pending) > self.PENDING_LIMIT
                    self._changed.notify_all()

        return put

    def pace(self) -> None:
        """Comes back when there is room again. Cheap while there is."""
        if self._full:
            with self._changed:
                while self._full and not self._given_up():
                    self._changed.wait(0.1)

    def _given_up(self) -> bool:
        return self._closing or self.failure is not None or self._stopped()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._closing)
                    pending, self._pending, self._full = self._pending, {}, False
                    self._changed.notify_all()
                    if not pending:
                        return
                for sink, data in pending.items():
                    sink(bytes(data))
        except BaseException as error:
            self.failure = error
            self._on_failure()

    def close(self, timeout: float | None = None) -> None:
        """Write out what is left and end the thread; after ``timeout`` seconds leave it to its slow reader."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)


@dataclass(slots=True)
class _Report:
    status: int | None = None
    ready: bool = False
    failures: list[str] = field(default_factory=list)


class Guest:
    """One run of what was loaded (``GuestImage.load``): connects the serial ports, starts the vCPUs, waits.

    ``console``, ``output`` and ``errors`` get bytes from a thread of this object. ``with`` stops the output thread.
    """

    def __init__(self, machine: Machine, *, console: Sink | None, output: Sink, errors: Sink) -> None:
        self._machine = machine
        self._report = _Report()
        self._control = ControlChannel()
        self._size = ConsoleSize(lambda data: machine.serial(CONTROL).push(data))
        self._tail: deque[int] = deque(maxlen=_TAIL_BYTES)
        self._reported = threading.Event()
        self._pump = Pump(machine.stop, lambda: machine.over)
        to_console = self._pump.to(console) if console else None

        def on_console(data: bytes) -> None:
            self._tail.extend(data)
            if to_console:
                to_console(data)

        try:
            machine.connect_serial(CONSOLE, on_console)
            machine.connect_serial(OUTPUT, self._pump.to(output))
            machine.connect_serial(ERRORS, self._pump.to(errors))
            machine.connect_serial(CONTROL, self._on_control)
            machine.set_pace(self._pump.pace)
        except BaseException:
            self._pump.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._machine.stop()
        self._pump.close(None if error is None else _ABANDON_SECONDS)

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
        ending = None
        while ending is None:
            reported = self._reported.is_set()  # before the wait: a report that comes during it starts the minute
            left = deadline - time.monotonic()
            ending = self._machine.wait(max(0.0, min(_POWEROFF_SECONDS if reported else 1.0, left)))
            if ending is None and time.monotonic() >= deadline:
                self._machine.stop(Ending.TIMEOUT)
            elif ending is None and reported:
                self._machine.stop()
            if ending is Ending.REBOOT and restart and not self._reported.is_set():
                self._report.ready = False
                self._machine.reset()
                self._control = ControlChannel()  # a line that the last boot did not end is not this one's
                self._size.forget()
                self._machine.start()
                ending = None
        self._pump.close()
        if self._pump.failure is not None:
            raise self._pump.failure
        failures = [*self._report.failures, *([self._machine.fault] if self._machine.fault else [])]
        return GuestResult(ending, self._report.status, tuple(failures), self.console)
