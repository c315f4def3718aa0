"""Run a program of the host with borrowed devices, and with descriptors that it may not open itself."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from pathlib import Path
from types import FrameType

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import HostNotReady, ProgramError
from kvmpass.host.address import Bdf, parse_distinct
from kvmpass.host.backend import IOMMU_NODE, IOMMUFD, cdevs, choose_backend
from kvmpass.host.drivers.borrow import borrow
from kvmpass.host.drivers.lock import Say
from kvmpass.host.sysfs import PciDevice, Sysfs

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as a shell says
CONTAINER_NODE = "dev/vfio/vfio"
_PLACEHOLDER = lazy_pattern(r"\{(?P<name>iommufd|container|(?P<kind>vfio|group|bdf)(?P<number>\d+))\}")
_QEMU = lazy_pattern(r"qemu-kvm|qemu-system-\w+")
_QEMU_SECONDS = 20.0  # to list its objects
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)
_LEFT_TO_PROGRAM = (signal.SIGINT, signal.SIGQUIT)  # a terminal sends them to both


@dataclass(frozen=True, slots=True)
class Placeholders:
    """The placeholders in a program's arguments.

    ``{iommufd}`` and ``{vfio0}`` are descriptors of ``/dev/iommu`` and of the first device's character device,
    ``{container}`` and ``{group0}`` those of type 1, ``{bdf0}`` is its address. Anything else in braces is left as it
    is. Raises ``ProgramError`` for a number without a device.
    """

    words: tuple[str, ...]
    """The program and its arguments."""
    devices: int
    """How many devices there are."""

    def __post_init__(self) -> None:
        for match in self._matches():
            if match["number"] and int(match["number"]) >= self.devices:
                raise ProgramError(
                    f"{match[0]} is in the arguments, and the number of devices is {self.devices}",
                    "write their numbers from 0 on",
                )

    def _matches(self) -> Iterator[re.Match[str]]:
        for word in self.words[1:]:
            yield from _PLACEHOLDER.finditer(word)

    @property
    def of_iommufd(self) -> list[str]:
        """Those that need iommufd, each once."""
        found = dict.fromkeys(match[0] for match in self._matches())
        return [text for text in found if text.startswith(("{iommufd", "{vfio"))]

    def nodes(self, sysfs: Sysfs, devices: Sequence[PciDevice]) -> dict[str, str]:
        """Return the path of the node to open for each placeholder that is a descriptor, without a leading slash."""
        found = {}
        for match in self._matches():
            if match["kind"] == "bdf":
                continue
            device = devices[int(match["number"])] if match["number"] else None
            if device is None:
                found[match["name"]] = IOMMU_NODE if match["name"] == "iommufd" else CONTAINER_NODE
            else:
                found[match["name"]] = (
                    cdevs(sysfs, device.bdf)[0] if match["kind"] == "vfio" else f"dev/vfio/{device.group}"
                )
        return found

    def filled(self, descriptors: dict[str, int], bdfs: Sequence[Bdf]) -> list[str]:
        """Return the program and its arguments with ``descriptors`` and addresses in place of placeholders."""

        def value(match: re.Match[str]) -> str:
            if match["kind"] == "bdf":
                return str(bdfs[int(match["number"])])
            return str(descriptors[match["name"]])

        return [self.words[0], *(_PLACEHOLDER.sub(value, word) for word in self.words[1:])]


def run_program(
    addresses: Sequence[Bdf | str],
    words: Sequence[str],
    *,
    sysfs: Sysfs | None = None,
    state_dir: Path | None = None,
    say: Say = lambda line: None,
) -> int:
    """Borrow devices, run a program until it ends, and rebind them; return its status, 128+N after signal N.

    ``words`` are the program and its arguments, with :class:`Placeholders`; the program inherits the descriptors
    that they name, and no others. SIGTERM and SIGHUP are forwarded to it, SIGINT and SIGQUIT ignored: a terminal
    sends them to the program, too. Raises before any change ``ProgramError``, ``HostNotReady`` (the kernel lacks what
    a placeholder needs), and what :func:`borrow` raises; ``OSError`` after the devices were rebound.

    Synchronization: in the main thread; in another one no signal is forwarded.
    """
    sysfs = sysfs or Sysfs()
    bdfs = parse_distinct(addresses)
    arguments = Placeholders(tuple(words), len(bdfs))
    _check_program(arguments)
    _check_iommufd(sysfs, bdfs, arguments)
    with borrow(*bdfs, sysfs=sysfs, state_dir=state_dir, say=say) as devices, ExitStack() as opened:
        _check_iommufd(sysfs, bdfs, arguments)  # bound devices say more
        descriptors: dict[str, int] = {}
        by_node: dict[str, int] = {}
        for name, node in arguments.nodes(sysfs, devices).items():
            if node not in by_node:  # the devices of a group share one
                by_node[node] = os.open(sysfs.path(node), os.O_RDWR | os.O_CLOEXEC)
                opened.callback(os.close, by_node[node])
            descriptors[name] = by_node[node]
            say(f"descriptor {by_node[node]}: /{node}")
        status = _run(arguments.filled(descriptors, bdfs), opened, [*by_node.values()])
        say(f"{words[0]} ended with status {status}")
    return status


def _check_iommufd(sysfs: Sysfs, bdfs: Sequence[Bdf], arguments: Placeholders) -> None:
    wanted = arguments.of_iommufd
    obstacle = choose_backend(sysfs, bdfs, IOMMUFD).obstacle if wanted else ""
    if obstacle:
        raise HostNotReady(
            f"{' and '.join(wanted)} cannot be opened: {obstacle}",
            "use type 1: {container} and {group0}, or QEMU's -device vfio-pci,host={bdf0}",
        )


def _check_program(arguments: Placeholders) -> None:
    program = arguments.words[0]
    if shutil.which(program) is None:
        if "/" in program and Path(program).exists():
            raise ProgramError(f"{program} is not executable", "make it executable", exit_status=NOT_EXECUTABLE)
        raise ProgramError(f"{program} was not found", "name a program of this host", exit_status=NOT_FOUND)
    if arguments.of_iommufd:
        for word in arguments.words:  # the program may be one that starts QEMU
            if _QEMU.fullmatch(Path(word).name) and (path := shutil.which(word)):
                _check_qemu(path)
                return


def _check_qemu(path: str) -> None:
    """Raise ``ProgramError`` if this QEMU lists its objects, and iommufd is not among them."""
    try:
        done = subprocess.run(
            [path, "-object", "help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_QEMU_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    objects = done.stdout.split()
    if "memory-backend-ram" in objects and "iommufd" not in objects:
        raise ProgramError(
            f"{path} does not know iommufd: it has no -object iommufd, which came with QEMU 9.0",
            "use a newer QEMU; or type 1, without {iommufd} and {vfio0}: -device vfio-pci,host={bdf0}",
        )


@dataclass(eq=False, slots=True)
class _Forwarding:
    """Signals for the program, also those that come before it has started."""

    process: subprocess.Popen[bytes] | None = None
    early: list[int] = field(default_factory=list)

    def forward(self, number: int, frame: FrameType | None) -> None:
        if self.process is None:
            self.early.append(number)
        else:
            self.process.send_signal(number)

    def started(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        for number in self.early:
            process.send_signal(number)


@contextmanager
def _signals(forwarding: _Forwarding) -> Iterator[None]:
    """Forward signals while the block runs. Handlers, as a program would inherit an ignored signal."""
    handlers = dict.fromkeys(_FORWARDED, forwarding.forward) | dict.fromkeys(_LEFT_TO_PROGRAM, lambda *_: None)
    with ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # nohup; not Python's
                    undo.callback(signal.signal, number, before)
                    signal.signal(number, handler)
        yield


def _run(words: Sequence[str], opened: ExitStack, fds: Sequence[int]) -> int:
    """Run the program until it ends; ``opened`` are this process's descriptors, closed once it has its own."""
    forwarding = _Forwarding()
    with _signals(forwarding):
        with subprocess.Popen(words, pass_fds=fds) as process:  # its end is waited for, whatever fails here
            forwarding.started(process)
            opened.close()
            if threading.current_thread() is threading.main_thread():
                _wait_for(process.pid)
        status = process.returncode
    return status if status >= 0 else 128 - status


def _wait_for(pid: int) -> None:
    """Wait for the end of a child, which stays to be waited for, and run handlers of signals meanwhile.

    A signal that comes right before waitpid(2) does not interrupt it: its handler would run once the child has ended.
    """
    with ExitStack() as undo:
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        undo.callback(os.close, woken)
        undo.callback(os.close, wake)
        ended = os.pidfd_open(pid)
        undo.callback(os.close, ended)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wake, warn_on_full_buffer=False))
        polled = select.poll()
        polled.register(woken, select.POLLIN)
        polled.register(ended, select.POLLIN)
        while all(fd != ended for fd, _ in polled.poll()):
            os.read(woken, 4096)
