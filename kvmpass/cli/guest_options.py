"""The options that say what a guest is made of, for every command that starts one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from kvmpass.cli.output import together
from kvmpass.cli.terminal import terminal_size
from kvmpass.guest import GuestSpec
from kvmpass.guest.directories import MINIMAL

guest_options = together(
    click.option(
        "--kernel",
        type=click.Path(path_type=Path),
        help="A bzImage, the directory in which a kernel was built, or /lib/modules/RELEASE.  [default: the running "
        "kernel]",
    ),
    click.option(
        "--initrd", type=click.Path(path_type=Path), help="An initramfs to use instead of the generated one."
    ),
    click.option("--append", default="", help="Append to the guest kernel's command line."),
    click.option(
        "--root",
        default="minimal",
        show_default=True,
        show_envvar=True,
        envvar="KVMPASS_GUEST_ROOT",
        metavar="minimal|host|DIR",
        help="The guest's root: busybox, made here; this host's files, read-only; or those of a directory. What the "
        "guest writes there stays in its memory.",
    ),
    click.option(
        "--share",
        "shares",
        multiple=True,
        metavar="SRC[:DST][,rw]",
        help="Let the guest read a directory of this host, at DST, by default the same path; with rw also write to "
        "it.  [repeatable]",
    ),
    click.option(
        "--copy",
        multiple=True,
        metavar="SRC:DST",
        help="Copy a file, a directory, or a program with its libraries to DST in the guest; into DST if it ends "
        "with a slash.  [repeatable]",
    ),
    click.option(
        "--copy-out",
        multiple=True,
        metavar="SRC[:DST]",
        help="When COMMAND has ended, copy a file or a directory of the guest to DST, by default its own name in the "
        "current directory; into DST if it ends with a slash.  [repeatable]",
    ),
    click.option(
        "--module",
        "modules",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE.ko",
        help="A driver to load instead of the kernel's own for the device.  [repeatable]",
    ),
    click.option("-i", "--interactive", is_flag=True, help="Pass standard input to COMMAND."),
)
"""Their names are those of ``GuestSpec``'s fields."""


def guest_spec(command: list[str] | None, **guest: Any) -> GuestSpec:
    """Return what the guest is made of, from its options and ``verbose``. Raises ``click.UsageError``."""
    if command is not None and not command:
        raise click.UsageError("missing COMMAND after --")
    if guest["interactive"] and command is None:
        raise click.UsageError("-i passes standard input to a COMMAND: a shell on the console has it anyway")
    if guest["copy_out"] and command is None:
        raise click.UsageError("--copy-out brings files out when a COMMAND has ended: name one after --")
    if guest["initrd"] and (command or guest["copy"] or guest["modules"]):
        raise click.UsageError("--initrd replaces the root file system that COMMAND, --copy and --module need")
    if guest["initrd"] and (guest["root"] != MINIMAL or guest["shares"]):
        raise click.UsageError("--initrd replaces the root file system that mounts --root and --share")
    own = tuple(command) if command else None
    return GuestSpec(**guest, command=own, terminal=os.environ.get("TERM", "linux"), terminal_size=terminal_size())
