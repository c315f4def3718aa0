"""``kvmpass assign``."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmpass.assignment.assign import assigned
from kvmpass.cli.console_log import ConsoleLog
from kvmpass.cli.guest_options import (
    command_options,
    guest_options,
    guest_spec,
    machine_options,
    run_options,
    stay_options,
    wrong_usage,
)
from kvmpass.cli.main import ASSIGN_FAILED
from kvmpass.cli.output import document_text, error_fields, error_text, write_all
from kvmpass.cli.params import BDF
from kvmpass.cli.progress import Progress
from kvmpass.cli.terminal import ESCAPE_NAME, raw_terminal
from kvmpass.errors import DeviceInUse, KvmpassError
from kvmpass.timings import Mark, unmarked

if TYPE_CHECKING:
    import uuid

    from kvmpass.assignment.passed import PassedDescriptors
    from kvmpass.guest import Guest, GuestResult, GuestSpec, Sink
    from kvmpass.host import Bdf
    from kvmpass.machine import Machine


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("bdf", nargs=-1, shell_complete=BDF.shell_complete)
@click.option("-d", "--detach", is_flag=True, help="Return once the guest is up, as kvmpass start does.")
@stay_options
@machine_options
@guest_options
@command_options
@click.option(
    "--vfio-fd",
    "vfio_fds",
    multiple=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="An open descriptor of a device that another process has bound: its character device, or its group with "
    "type 1.  [repeatable]",
)
@click.option(
    "--iommu-fd",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --vfio-fd: an open descriptor of /dev/iommu, or of /dev/vfio/vfio with type 1, for this guest alone.",
)
@click.option(
    "--on-reboot",
    type=click.Choice(["end", "restart"]),
    default="end",
    show_default=True,
    help="On guest reboot: end, or restart with the same devices and run COMMAND again.",
)
@run_options
@click.option("--timings", is_flag=True, help="Print how long each stage took, and what made the guest exit.")
@click.option("--status-file", type=click.Path(path_type=Path), help="Write the result to this file, as JSON.")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Print mappings and device events; show the kernel's messages, with COMMAND the whole console.",
)
@click.pass_obj
def assign(
    command: list[str] | None,
    /,
    bdf: tuple[str, ...],
    detach: bool,
    name: str | None,
    boot_timeout: float | None,
    **options: Any,
) -> int:
    """Boot a Linux guest and assign the PCI devices BDF to it.

    \b
    kvmpass assign [OPTIONS] BDF...                 a shell in the guest, on this terminal
    kvmpass assign [OPTIONS] BDF... -- COMMAND...   run COMMAND in the guest
    kvmpass assign -d [OPTIONS] BDF...              a guest that stays, as with kvmpass start
    kvmpass assign --vfio-fd N --iommu-fd N ...     devices that another process has bound and opened

    Each device is bound to vfio-pci while the guest runs. When the guest ends, for any reason, the device is rebound
    to its driver (after a SIGKILL of kvmpass: kvmpass restore). Its DMA reaches the guest's memory and nothing else;
    with --p2p also the BARs of the guest's other devices.
    Needs root; or devices that root has bound (kvmpass bind), and the permissions that kvmpass doctor lists.

    With --vfio-fd the devices stay bound to vfio-pci, and this process needs permission for /dev/kvm and a limit for
    locked memory only. A descriptor tells its device; BDF chooses among the devices of a group.

    With COMMAND, kvmpass has the standard output, standard error and exit status of COMMAND, whose input is empty
    unless -i passes this one. With -t, COMMAND has a terminal: every key goes to it, and Ctrl-] ends the guest.
    Without COMMAND, this terminal is the guest's console, in raw mode: every key goes to the guest, and Ctrl-] ends
    the guest. The guest follows changes of the terminal's size. If standard input is not a terminal, the shell reads
    commands from it and ends at its end.

    With COMMAND, a crash or a lockup of the guest's kernel ends the guest, and its console is printed from there on.
    Parameters of --append take precedence: oops=, softlockup_panic=, hung_task_panic=, watchdog_thresh=.

    \b
    Exit status: with COMMAND its own, or:
      124  --timeout expired
      125  kvmpass failed, or was called wrongly; or COMMAND has succeeded, but not --copy-out
      126  the guest ended without reporting a status
      130, 143  interrupted by Ctrl-C, by SIGTERM (129, 131: SIGHUP, SIGQUIT)
    """
    if detach:
        return _detach(command, bdf, name=name, boot_timeout=boot_timeout, **options)
    if name is not None or boot_timeout is not None:
        raise click.UsageError("--name and --boot-timeout are for a guest that stays: add -d")
    return _run_to_its_end(command, bdf, **options)


def _detach(command: list[str] | None, bdf: tuple[str, ...], **options: Any) -> int:
    """Start a guest that stays. Raises ``click.UsageError`` for an option that has no meaning for it."""
    from kvmpass.cli.start import start_guest

    if options.pop("vfio_fds") or options.pop("iommu_fd") is not None:
        raise wrong_usage(
            "-d outlives the process that has bound the devices of --vfio-fd", "bind them with kvmpass bind"
        )
    if not bdf:
        raise click.MissingParameter(param_hint="'BDF...'", param_type="argument")
    for option, (absent, remedy) in _NOT_DETACHED.items():
        if options.pop(option) != absent:
            raise wrong_usage(f"-d has no --{option.replace('_', '-')}", remedy)
    if any(options[name] for name in ("interactive", "tty", "environment", "directory")):
        raise wrong_usage("-d has no -i, -t, -e and -w", "give them to each command: kvmpass exec GUEST -- COMMAND")
    return start_guest(command, tuple(BDF.convert(text, None, None) for text in bdf), **options)


_NOT_DETACHED: dict[str, tuple[object, str]] = {
    "on_reboot": ("end", "wait for the guest's end, then start it again: kvmpass wait GUEST"),
    "timings": (False, "measure a guest that ends with its command: kvmpass assign --timings BDF... -- COMMAND"),
    "status_file": (None, "ask how the guest has ended: kvmpass wait GUEST"),
}
"""What has no meaning for a guest that stays: its value when it is absent, and what serves instead."""


def _run_to_its_end(
    command: list[str] | None,
    bdf: tuple[str, ...],
    *,
    memory: str,
    cpus: int,
    backing: str,
    backend: str,
    p2p: bool,
    vfio_fds: tuple[int, ...],
    iommu_fd: int | None,
    vf_token: uuid.UUID | None,
    on_reboot: str,
    timeout: float | None,
    console_log: Path | None,
    timings: bool,
    status_file: Path | None,
    **guest: Any,
) -> int:
    """Run a guest until its end; return the exit status."""
    descriptors = _descriptors(bdf, vfio_fds, iommu_fd)
    if status_file is not None and not os.access(status_file.absolute().parent, os.W_OK):
        raise click.UsageError(f"--status-file: {status_file.absolute().parent} is not a directory to write to")
    if status_file is not None:
        status_file.unlink(missing_ok=True)  # if this run is killed, no earlier result must remain
    outcome: dict[str, Any] = {
        "bdfs": list(bdf),
        "outcome": "failed",
        "guest_exit_status": None,
        "backend": None,
        "peer_mappings": None,
        "timings": None,
        "copied_out": [],
        "events": [],
        "events_dropped": 0,
        "guest_errors": [],
        "error": None,
    }
    started = time.monotonic()
    measured = None
    if timings:
        from kvmpass.cli.timings import Measured

        measured = Measured()
    mark = measured.timings.mark if measured else unmarked
    mark("start of Python, imports")
    exit_status = ASSIGN_FAILED
    try:
        # Not the argument's type: the status file must report a wrong address, too.
        bdfs = [BDF.convert(text, None, None) for text in bdf]
        spec = guest_spec(command, **guest)
        progress = Progress(spec.verbose, outcome)
        # The devices are rebound first: a reader of the guest's output, or a destination of its files, may stall.
        with closing(ConsoleLog(console_log)) as log, ExitStack() as readers:
            with (
                _naming_guest(bdfs),
                assigned(
                    bdfs,
                    spec,
                    memory=memory,
                    cpus=cpus,
                    backing=backing,
                    backend=backend,
                    p2p=p2p,
                    descriptors=descriptors,
                    vf_token=vf_token,
                    say=progress.say if spec.verbose else None,
                    warn=lambda line: click.echo(f"kvmpass: warning: {line}", err=True),
                    on_event=progress.note,
                    mark=mark,
                ) as machine,
            ):
                if measured:
                    measured.machine = machine
                # Before the guest can use up descriptors, or an upgrade replace the files.
                from kvmpass._garbage import collect_as_usual
                from kvmpass.cli import ending
                from kvmpass.cli.documents import backend_document, peers_document

                if spec.copy_out:
                    from kvmpass.cli.copied import report
                if status_file is not None:
                    import dataclasses  # noqa: F401 - document_text uses both
                    import json  # noqa: F401

                outcome["backend"] = backend_document(machine.backend)
                outcome["bdfs"] = list(bdf) or [str(device.bdf) for device in machine.devices]
                running = readers.enter_context(_guest(machine, spec, log, mark))
                collect_as_usual()
                _follow(machine, running, spec, restart=on_reboot == "restart", timeout=timeout)
                outcome["peer_mappings"] = peers_document(machine.domain)
                outcome["guest_exit_status"] = running.status  # valid even if rebinding a device fails
            result = running.result()
        exit_status = ending.exit_status(result, command=command is not None)
        outcome.update(outcome=_outcome(result), guest_errors=list(result.failures))
        outcome["copied_out"] = result.copied_out
        if command is not None and result.status is None:
            _explain(result)
        if result.copied_out:
            for line in report(result.copied_out, verbose=spec.verbose):
                click.echo(f"kvmpass: {line}", err=True)
        return exit_status
    except BaseException as error:
        exit_status = ASSIGN_FAILED
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            exit_status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
            outcome.update(outcome="interrupted")
        outcome["error"] = error_fields(error)
        raise
    finally:
        if measured:
            outcome["timings"] = measured.document()
        if status_file is not None:
            outcome.update(exit_status=exit_status, seconds=round(time.monotonic() - started, 3))
            try:
                _write_status(status_file, outcome)
            except OSError as failure:
                _print_last([f"--status-file: {failure}"])
        if measured:
            _print_last(measured.lines())


def _print_last(lines: Iterable[str]) -> None:
    """Print lines on standard error if it takes any: a full disk must not change how the command ends."""
    with suppress(OSError):
        click.echo("\n".join(f"kvmpass: {line}" for line in lines), err=True)


@contextmanager
def _naming_guest(bdfs: Sequence[Bdf]) -> Iterator[None]:
    """Let the error say which guest of this user has one of the devices, if it is one that stays."""
    try:
        yield
    except DeviceInUse as error:
        from kvmpass.session.directory import naming_guest

        raise naming_guest(error, [*map(str, bdfs)]) from None


def _descriptors(bdf: tuple[str, ...], vfio: tuple[int, ...], iommu: int | None) -> PassedDescriptors | None:
    """Return the descriptors to use, if there are any. Raises ``click.UsageError``."""
    if vfio and iommu is not None:
        from kvmpass.assignment.passed import PassedDescriptors

        return PassedDescriptors(iommu, vfio)
    if vfio or iommu is not None:
        missing = "--iommu-fd: the descriptor of the IOMMU" if vfio else "--vfio-fd: the descriptors of the devices"
        raise click.UsageError(f"missing {missing}")
    if not bdf:
        raise click.MissingParameter(param_hint="'BDF...'", param_type="argument")
    return None


def _guest(machine: Machine, spec: GuestSpec, log: ConsoleLog, mark: Mark) -> Guest:
    from kvmpass.guest import Guest

    to_stdout = descriptor_sink(sys.stdout.fileno())
    # One sink for one file: it keeps the order of what the command writes to both.
    same = os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    to_stderr = to_stdout if same else descriptor_sink(sys.stderr.fileno())
    console = to_stdout if spec.command is None else to_stderr if spec.verbose else None
    return Guest(
        machine,
        console=log.beside(console),
        output=to_stdout,
        errors=to_stderr,
        interactive=spec.interactive or spec.tty,
        terminal=spec.terminal_size if spec.tty else None,
        copy_out=spec.copy_out,
        mark=mark,
    )


def _follow(machine: Machine, guest: Guest, spec: GuestSpec, *, restart: bool, timeout: float | None) -> None:
    """Run the guest until it ends, with this terminal, or standard input, where that is wanted."""
    if spec.command is None or spec.tty:
        click.echo(f"kvmpass: {ESCAPE_NAME} ends the guest", err=True)
    with _terminal(machine, guest, spec):
        try:
            guest.follow(restart=restart, timeout=timeout)
        except (KeyboardInterrupt, SystemExit) as error:
            # A stalled reader must not delay the devices' release.
            if spec.command is not None and select.select([], [sys.stderr], [], 0)[1]:
                click.echo(f"kvmpass: {error_text(error)}; the guest's console:", err=True)
                _show_console(guest.console)
            raise


def _terminal(machine: Machine, guest: Guest, spec: GuestSpec) -> AbstractContextManager[None]:
    """Return what passes standard input to the guest."""
    if spec.command is None:
        return raw_terminal(guest.type, machine.stop, guest.resize)
    if guest.input is None:
        return nullcontext()
    if spec.tty:
        return raw_terminal(guest.input.send, machine.stop, guest.resize)
    from kvmpass.cli.input import passed_input

    return passed_input(guest.input)


def descriptor_sink(fd: int) -> Sink:
    """Return a sink that writes to ``fd`` without a buffer, whose lock a stalled reader could hold."""
    from kvmpass.guest.output import DescriptorSink

    def write(data: bytes) -> None:
        try:
            write_all(fd, data)
        except BrokenPipeError as error:
            raise KvmpassError("output closed by its reader: the guest was stopped") from error

    return DescriptorSink(fd, write)


def _explain(result: GuestResult) -> None:
    click.echo(f"kvmpass: the guest {result.outcome.value} before its command reported a status", err=True)
    for failure in result.failures:
        click.echo(f"  error in the guest: {failure}", err=True)
    _show_console(result.console)


def _show_console(console: str) -> None:
    """Print the console, from the first sign of a crash on if there is one."""
    from kvmpass import crash

    for line in crash.excerpt(console):
        click.echo(f"  console: {''.join(c if c.isprintable() else ' ' for c in line)}", err=True)


def _outcome(result: GuestResult) -> str:
    return "exited" if result.status is not None else result.outcome.name.lower().replace("_", "-")


def _write_status(path: Path, outcome: dict[str, Any]) -> None:
    """Write atomically: a reader never sees a part of the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(document_text("assign", **outcome) + "\n")
    temporary.replace(path)
