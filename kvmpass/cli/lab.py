"""``kvmpass lab``: an emulated AMD host for a command, a shell, and the pieces it is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvmpass.errors import LabError
from kvmpass.lab import build, cache, devices, modern
from kvmpass.lab import headers as kernel_headers
from kvmpass.lab import status as state
from kvmpass.lab.config import ACCELERATORS, LabConfig, LabResult, split_features
from kvmpass.lab.lab import Lab


def say(text: str) -> None:
    """Progress, where it does not mix with output."""
    click.echo(f"kvmpass lab: {text}", err=True)


def complete_device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Those of QEMU's devices that the lab knows more of than their name."""
    return [CompletionItem(name) for name in sorted(devices.KNOWN) if name.startswith(incomplete)]


def complete_kernel(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names, and files."""
    names = [CompletionItem(name) for name in ("stock", "full") if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="file")]


def host_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe an emulated host."""
    options = [
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="NAME[,PROPERTY=VALUE…]",
            shell_complete=complete_device,
            help="A PCI device of the host: nvme, e1000e, edu, or any other of QEMU's. Repeatable.",
        ),
        click.option("--memory", default="4G", show_default=True, metavar="SIZE", help="The host's memory."),
        click.option(
            "--cpus",
            default=1,
            show_default=True,
            metavar="N",
            help="The host's CPUs. With more than one its guests die now and then: QEMU's fault.",
        ),
        click.option(
            "--kernel",
            default="stock",
            show_default=True,
            metavar="stock|full|PATH",
            shell_complete=complete_kernel,
            help="The host's kernel: Debian's, the one with iommufd, or a bzImage.",
        ),
        click.option("--append", default="", metavar="TEXT", help="More for the host kernel's command line."),
        click.option(
            "--without",
            multiple=True,
            metavar="FEATURE[,…]",
            help="A host that lacks svm, iommu or intremap. Repeatable.",
        ),
        click.option(
            "--accel", default="auto", show_default=True, type=click.Choice(ACCELERATORS), help="How QEMU runs."
        ),
        click.option(
            "--qemu", default="system", show_default=True, metavar="system|modern|PATH", help="Which QEMU runs."
        ),
        click.option(
            "--writable",
            multiple=True,
            metavar="DIR",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="A directory that the command may write to for good. Repeatable.",
        ),
        click.option(
            "--iommu-trace",
            metavar="FILE",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Where the IOMMU's translations are written, a line each.",
        ),
        click.option("--timeout", type=float, metavar="SECONDS", help="End the run after this time, boot included."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def configuration(options: dict[str, Any]) -> LabConfig:
    return LabConfig(**options | {"without": split_features(options["without"])})


def conclude(result: LabResult) -> int:
    """Tell about an end that was not the command's; returns the exit status."""
    if result.outcome != "exited":
        say(result.describe())
        for line in result.console_tail.splitlines():
            click.echo(f"  | {line}", err=True)
    return result.exit_status


@click.group()
def lab() -> None:
    """An emulated AMD host: AMD-V, AMD-Vi, interrupt remapping and PCI devices, without any of them at hand."""


@lab.command(options_metavar="[OPTIONS] -- COMMAND…")
@host_options
@click.pass_obj
def run(command: list[str] | None, /, **options: Any) -> int:
    """Run COMMAND as root inside an emulated host, and exit with its status.

    124: the time was up. 125: the host could not be started. 126: it ended without reporting a status.
    """
    if not command:
        raise LabError("no command to run in the lab", "kvmpass lab run [OPTIONS] -- COMMAND…")
    return conclude(Lab(configuration(options), say).run(command))


@lab.command()
@host_options
def shell(**options: Any) -> int:
    """Open a root shell inside an emulated host."""
    return conclude(Lab(configuration(options), say).shell())


@lab.command()
def status() -> int:
    """Show what is installed, cached and missing. Fails if a plain run would."""
    rows = state.rows()
    width = max(len(row.part) for row in rows)
    for row in rows:
        click.echo(f"{row.part:<{width}}  {'' if row.ok else 'MISSING: '}{row.text}")
    if all(row.ok for row in rows):
        return 0
    click.echo(f"supported hosts: {state.SUPPORTED_HOSTS}", err=True)
    return 1


@lab.command()
@click.option("--again", is_flag=True, help="Build it even if it is in the cache.")
@click.option("--jobs", default=0, metavar="N", help="Compilers at once; one for each CPU by default.")
def kernel(again: bool, jobs: int) -> None:
    """Build the full kernel, the one with iommufd (about 8 minutes on 2 cores).

    It loads no modules. The stock kernel does: kvmpass lab headers.
    """
    live = sys.stderr.isatty()

    def count(made: int) -> None:
        if live:
            click.echo(f"\r  {made} files", nl=False, err=True)
        elif made % 500 == 0:
            say(f"{made} files")

    built = build.build(say, count, jobs=jobs, again=again)
    if live:
        click.echo(err=True)
    click.echo(f"{built.release}: {built.image}")


@lab.command()
@click.option("--again", is_flag=True, help="Fetch them even if they are in the cache.")
def headers(again: bool) -> None:
    """Fetch the stock kernel's headers, and print their directory.

    A module for the lab's hosts, and for guests in them, is built with it:

    \b
      make -C "$(kvmpass lab headers)" M="$PWD" modules
    """
    click.echo(kernel_headers.fetch(say, again=again))


@lab.command()
@click.option("--again", is_flag=True, help="Fetch it even if it is in the cache.")
def qemu(again: bool) -> None:
    """Fetch the modern QEMU: root ports, virtual functions, fault events."""
    emulator = modern.fetch(say, again=again)
    click.echo(f"QEMU {emulator.version_text}: {emulator.path}")


@lab.command()
def clean() -> None:
    """Remove the cache: kernels, headers, initial file systems, the modern QEMU."""
    freed = cache.clean()
    click.echo(f"{cache.cache_root()}: {freed / 1e6:.0f} MB freed")
