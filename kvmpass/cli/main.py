"""The ``kvmpass`` command: its subcommands, and the one place where exceptions become exit statuses."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from kvmpass._log import keep_off_standard_error
from kvmpass._signals import importing, raise_at_signals
from kvmpass.cli.output import colour, document_text, error_fields, error_text, remedies
from kvmpass.errors import BadAddress, KvmpassError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Module and one-line help. A subcommand is imported when it is called: --help and completion of its name need none.
COMMANDS = {
    "assign": ("kvmpass.cli.assign", "Boot a Linux guest and assign the PCI devices BDF to it."),
    "bind": ("kvmpass.cli.bind", "Bind devices to vfio-pci, until unbind or reboot."),
    "borrow": ("kvmpass.cli.borrow", "Run a program of this host while devices are bound to vfio-pci."),
    "console": ("kvmpass.cli.console", "Attach this terminal to the console of GUEST."),
    "cp": ("kvmpass.cli.cp", "Copy a file or a directory into a guest, or out of it."),
    "completion": ("kvmpass.cli.completion", "Print the completion script for SHELL."),
    "doctor": ("kvmpass.cli.doctor", "Check everything that an assignment needs."),
    "exec": ("kvmpass.cli.exec", "Run COMMAND in a guest that kvmpass start has started."),
    "lab": ("kvmpass.cli.lab", "Run a command or a shell in an emulated AMD host."),
    "list": ("kvmpass.cli.list", "Show PCI devices by IOMMU group, and which can be assigned."),
    "logs": ("kvmpass.cli.logs", "Print what the console of GUEST has printed since its start."),
    "monitor": ("kvmpass.cli.monitor", "Show events of PCI devices, drivers and VFIO groups."),
    "plan": ("kvmpass.cli.plan", "Show what kvmpass assign would do, and change nothing."),
    "ps": ("kvmpass.cli.ps", "Show this user's guests that kvmpass start has started."),
    "restore": ("kvmpass.cli.restore", "Restore the drivers that a killed kvmpass changed."),
    "show": ("kvmpass.cli.show", "Show everything about one device and its IOMMU group."),
    "start": ("kvmpass.cli.start", "Boot a Linux guest that stays, and assign the PCI devices BDF to it."),
    "stop": ("kvmpass.cli.stop", "Let each GUEST power off, and rebind its devices to their drivers."),
    "unbind": ("kvmpass.cli.bind", "Unbind devices from vfio-pci and rebind them to their drivers."),
    "wait": ("kvmpass.cli.stop", "Wait until GUEST has ended and its devices are rebound."),
}

_WITH_COMMAND = ("assign", "borrow", "exec", "lab", "start")  # start says that it has none

COMPLETE = "_KVMPASS_COMPLETE"  # set by the completion function of a shell: its request
FAILED = 1
ASSIGN_FAILED = 125  # as with `docker run`: kvmpass failed, not the command
TIME_UP = 124  # as with timeout(1)
GUEST_SILENT = 126  # the guest ended without reporting a status


class LazyGroup(click.Group):
    """A group whose subcommands live in ``COMMANDS``; the module's attribute has the subcommand's name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all subcommands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        _set_up_logging()
        with importing():
            command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands with their one-line helps."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the subcommands that begin with ``incomplete``, then what a command without subcommands has."""
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        subcommands = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return subcommands + click.Command.shell_complete(self, ctx, incomplete)


def _set_up_logging() -> None:
    if os.environ.get("KVMPASS_DEBUG"):
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(relativeCreated)8d %(name)s: %(message)s")
    else:
        keep_off_standard_error()  # it belongs to the command


def documentation(prefix: str) -> str | None:
    """Where the wheel's documentation is; ``None`` if kvmpass runs from its source, or in another prefix."""
    pages = f"{prefix}/share/doc/kvmpass"
    return f"Documentation: man kvmpass, and {pages}" if os.access(pages, os.X_OK) else None


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=documentation(sys.prefix),
)
@click.version_option(package_name="kvmpass", prog_name="kvmpass")
def kvmpass() -> None:
    """Assign PCI devices to virtual machines on AMD hosts (KVM, VFIO, AMD-Vi)."""


def split_command(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """Split at the first bare ``--``, which click would drop; ``None`` where there is none."""
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def hint_separator(words: list[str], command: list[str] | None, error: BaseException) -> None:
    """Add a hint to a usage error that may come from a missing ``--`` before COMMAND, where there can be one."""
    detached = words[:1] == ["assign"] and {"-d", "--detach"} & set(words)  # elsewhere -d may be the COMMAND's own
    if detached or words[:1] in (["start"], ["wait"]) or words[:2] == ["lab", "selftests"]:
        return
    if isinstance(error, click.UsageError):
        # Another cause is known of these.
        likely = not isinstance(error, click.MissingParameter) and not hasattr(error, "__notes__")
    else:
        likely = isinstance(error, BadAddress)
    if command is None and likely:
        first = words[: 2 if words[:1] == ["lab"] else 1]
        error.add_note(f"write -- before a COMMAND: kvmpass {' '.join(first)} … -- COMMAND")


def fail(command: str, error: BaseException, as_json: bool) -> None:
    """Print the error: a document with ``--json``, if it can be written, else lines on standard error."""
    if as_json:
        try:
            click.echo(document_text(command, error=error_fields(error)))
            return
        except OSError:  # a full disk, which may be the very error
            sys.stdout = None
    with suppress(OSError):  # the exit status tells of the error, too
        if isinstance(error, click.ClickException):
            error.show()
        else:
            click.echo(f"kvmpass: {error_text(error)}", err=True)
        for remedy in remedies(error):
            click.echo(f"  hint: {remedy}", err=True)


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the caller has closed: else the next file takes its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    open_standard_streams()
    if request := os.environ.get(COMPLETE):
        from kvmpass.cli.completion import answer

        sys.exit(answer(kvmpass, request))
    words = sys.argv[1:] if arguments is None else arguments
    name = next((word for word in words if not word.startswith("-")), "")
    options, command = split_command(words) if name in _WITH_COMMAND else (words, None)
    as_json = "--json" in options
    in_lab = name == "lab" and bool({"run", "selftests"} & set(options))
    own = ASSIGN_FAILED if name in ("assign", "borrow", "exec", "start", "wait") or in_lab else None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # inherited as ignored it hides how children end
    status: int
    try:
        raise_at_signals()
        result = kvmpass.main(options, prog_name="kvmpass", standalone_mode=False, obj=command, color=colour())
        status = result if isinstance(result, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        status = 130
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else FAILED
    except (click.ClickException, KvmpassError, OSError) as error:
        if os.environ.get("KVMPASS_DEBUG"):
            import logging

            logging.exception("kvmpass failed")
        if own:
            hint_separator(options, command, error)
        fail(name, error, as_json)
        status = getattr(error, "exit_status", own) or int(getattr(error, "exit_code", FAILED))
    except Exception:
        import traceback

        traceback.print_exc()
        status = own or FAILED
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # output closed by its reader
        sys.stdout = None
    sys.exit(status)
