"""The options that say what a guest is made of, for every command that starts one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from kvmpass.cli.output import together
from kvmpass.cli.params import backend_option, files_option, hugepages_option, p2p_option
from kvmpass.cli.terminal import terminal_size
from kvmpass.errors import KvmpassError
from kvmpass.guest.spec import GuestSpec

machine_options = together(
    click.option("--memory", default="1G", show_default=True, help="Guest memory: a number with K, M, G or T."),
    click.option("--cpus", default=1, show_default=True, help="Number of vCPUs."),
    hugepages_option,
    backend_option,
    p2p_option,
    click.option(
        "--vf-token", type=click.UUID, help="VF token (UUID) of a virtual function and its physical function."
    ),
)
"""What the machine has."""


guest_options = together(
    click.option(
        "--kernel",
        type=click.Path(path_type=Path),
        help="A bzImage or vmlinux, the directory in which a kernel was built, or /lib/modules/RELEASE.  [default: "
        "the running kernel]",
    ),
    click.option(
        "--initrd",
        type=click.Path(path_type=Path),
        help="An initramfs to use instead of the generated one. A guest that stays has the agent beside its init.",
    ),
    click.option("--append", default="", help="Append to the guest kernel's command line."),
    click.option(
        "--kaslr",
        is_flag=True,
        help="Let the kernel decompress itself and choose a random address (KASLR); it boots more slowly.",
    ),
    files_option,
    click.option(
        "--copy",
        multiple=True,
        metavar="SRC:DST",
        help="Copy a file, a directory, or a program with its libraries to DST in the guest; into DST if it ends "
        "with a slash.  [repeatable]",
    ),
    click.option(
        "--module",
        "modules",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE.ko",
        help="A driver to load instead of the kernel's own for the device.  [repeatable]",
    ),
    click.option(
        "--copy-out",
        multiple=True,
        metavar="SRC[:DST]",
        help="When COMMAND has ended, or a guest that stays is stopped, copy a file or a directory of the guest to "
        "DST, by default its own name in the current directory; into DST if it ends with a slash.  [repeatable]",
    ),
)
"""What the guest is made of. Their names are those of ``GuestSpec``'s fields."""


stay_options = together(
    click.option("--name", help="Name of a guest that stays.  [default: the address of its first device]"),
    click.option(
        "--boot-timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Give up if a guest that stays does not run commands after this time.  [default: 120]",
    ),
)
"""What a guest that stays has. Absent ones are None."""


run_options = together(
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="End the guest after this time, boot included; exit status 124, of kvmpass wait for a guest that stays.",
    ),
    click.option("--console-log", type=click.Path(path_type=Path), help="Write the whole console to this file."),
)
"""What its run has."""


command_options = together(
    click.option("-i", "--interactive", is_flag=True, help="Pass standard input to COMMAND."),
    click.option(
        "-t",
        "--tty",
        is_flag=True,
        help="Give COMMAND a terminal, with the keys and the size of this one. Its errors are part of its output.",
    ),
    click.option(
        "-e",
        "--env",
        "environment",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Set a variable for COMMAND; without VALUE to its value here, if it has one.  [repeatable]",
    ),
    click.option(
        "-w",
        "--workdir",
        "directory",
        default="",
        metavar="DIR",
        help="Where COMMAND starts.  [default: this directory with --root host, else /root]",
    ),
)
"""What its command gets, for a guest that has one. Their names are those of ``GuestSpec``'s fields."""


def wrong_usage(message: str, remedy: str) -> click.UsageError:
    """Return a usage error with its remedy."""
    error = click.UsageError(message)
    error.add_note(remedy)
    return error


def _variables(given: tuple[str, ...]) -> tuple[str, ...]:
    if not given:
        return ()
    from kvmpass.cli.variables import variables

    return variables(given)


def guest_spec(command: list[str] | None, **guest: Any) -> GuestSpec:
    """Return what the guest is made of, from its options and ``verbose``. Raises ``click.UsageError``."""
    if command is not None and not command:
        raise click.UsageError("missing COMMAND after --")
    if guest.get("interactive") and command is None:
        raise click.UsageError("-i passes standard input to a COMMAND: a shell on the console has it anyway")
    if command is None and any(guest.get(name) for name in ("tty", "environment", "directory")):
        raise click.UsageError("-t, -e and -w are for a COMMAND: name one after --")
    if guest.get("tty") and not os.isatty(sys.stdin.fileno()):
        raise click.UsageError("-t passes the keys of a terminal, and standard input is none: use -i")
    if guest.get("copy_out") and command is None and not guest.get("session"):
        raise click.UsageError("--copy-out brings files out when a COMMAND has ended: name one after --, or use -d")
    guest["environment"] = _variables(guest.get("environment", ()))
    own = tuple(command) if command else None
    spec = GuestSpec(**guest, command=own, terminal=os.environ.get("TERM", "linux"), terminal_size=terminal_size())
    try:
        spec.check()
    except KvmpassError as error:
        usage = click.UsageError(str(error))
        usage.__notes__ = getattr(error, "__notes__", [])
        raise usage from None
    return spec
