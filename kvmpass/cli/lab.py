"""``kvmpass lab``: run a command or a shell in an emulated AMD host, and manage its kernels and QEMU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvmpass.cli import tables
from kvmpass.cli.output import together
from kvmpass.errors import LabError
from kvmpass.lab import build, cache, devices, kernels, modern
from kvmpass.lab import headers as kernel_headers
from kvmpass.lab import selftests as kernel_selftests
from kvmpass.lab import status as state
from kvmpass.lab.config import ACCELERATORS, LabConfig, LabResult, split_features
from kvmpass.lab.lab import Lab


def say(text: str) -> None:
    """Print progress on standard error."""
    click.echo(f"kvmpass lab: {text}", err=True)


def complete_device(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete QEMU's devices for which the lab has defaults."""
    return [CompletionItem(name) for name in sorted(devices.KNOWN) if name.startswith(incomplete)]


def complete_kernel(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the kernels' names, else files."""
    names = [CompletionItem(name) for name in ("stock", *kernels.RECIPES) if name.startswith(incomplete)]
    return names or [CompletionItem(incomplete, type="file")]


def complete_selftest(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of the selftests that have been built."""
    built = kernel_selftests.programs(kernel_selftests.cached())
    return [CompletionItem(name) for name in built if name.startswith(incomplete)]


KERNEL_HELP = "The host's kernel: stock (Debian's), full (with iommufd), next (Linux 7.3), or a bzImage."

host_options = together(
    click.option(
        "--device",
        "devices",
        multiple=True,
        metavar="NAME[,PROPERTY=VALUE…]",
        shell_complete=complete_device,
        help="A PCI device of the host: nvme, e1000e, edu, or any other device of QEMU.  [repeatable]",
    ),
    click.option("--memory", default="4G", show_default=True, metavar="SIZE", help="The host's memory."),
    click.option(
        "--cpus",
        default=1,
        show_default=True,
        metavar="N",
        help="The host's CPUs. With more than one, guests sometimes die because of a bug in QEMU.",
    ),
    click.option(
        "--kernel",
        default="stock",
        show_default=True,
        metavar="stock|full|next|PATH",
        shell_complete=complete_kernel,
        help=KERNEL_HELP,
    ),
    click.option("--append", default="", metavar="TEXT", help="Append to the host kernel's command line."),
    click.option(
        "--without",
        multiple=True,
        metavar="FEATURE[,…]",
        help="A host without svm, iommu or intremap.  [repeatable]",
    ),
    click.option(
        "--accel", default="auto", show_default=True, type=click.Choice(ACCELERATORS), help="QEMU's accelerator."
    ),
    click.option(
        "--qemu",
        metavar="system|modern|PATH",
        help="The QEMU to use.  [default: modern with --kernel next, else system]",
    ),
    click.option(
        "--writable",
        multiple=True,
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="A directory of this machine that the command may write to.  [repeatable]",
    ),
    click.option(
        "--iommu-trace",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write each translation of the IOMMU to FILE, one a line.",
    ),
    click.option("--timeout", type=float, metavar="SECONDS", help="End the run after this time, boot included."),
)
"""The options that describe an emulated host."""


def configuration(options: dict[str, Any]) -> LabConfig:
    """Return the configuration that the options of ``host_options`` describe. Raises ``LabError``."""
    return LabConfig(**options | {"without": split_features(options["without"])})


def conclude(result: LabResult) -> int:
    """Return the exit status; print the reason if the host ended before the command."""
    if result.outcome != "exited":
        say(result.summary)
        for line in result.console_tail.splitlines():
            click.echo(f"  | {line}", err=True)
    return result.exit_status


@click.group()
def lab() -> None:
    """Run a command or a shell in an emulated AMD host.

    The host has AMD-V, AMD-Vi, interrupt remapping and PCI devices. It runs on any x86-64 machine.
    """


@lab.command(options_metavar="[OPTIONS] -- COMMAND…")
@host_options
@click.pass_obj
def run(command: list[str] | None, /, **options: Any) -> int:
    """Run COMMAND as root inside an emulated host, and exit with its status.

    Exit status 124: --timeout expired. 125: the host could not be started. 126: it ended without reporting a status.
    """
    if not command:
        raise LabError("missing COMMAND", "write kvmpass lab run [OPTIONS] -- COMMAND…")
    return conclude(Lab(configuration(options), say).run(command))


@lab.command()
@host_options
def shell(**options: Any) -> int:
    """Open a root shell inside an emulated host."""
    return conclude(Lab(configuration(options), say).shell())


@lab.command()
def status() -> int:
    """Show what is installed, cached and missing. Exit status 1 if a run without options would fail."""
    rows = state.rows()
    for line in tables.table([(row.part, row.text if row.ok else f"MISSING: {row.text}") for row in rows]):
        click.echo(line)
    if all(row.ok for row in rows):
        return 0
    click.echo(f"supported hosts: {state.SUPPORTED_HOSTS}", err=True)
    return 1


@lab.command()
@click.option("--next", "next_", is_flag=True, help="Build the next kernel instead: Linux 7.3.")
@click.option("--again", is_flag=True, help="Build it even if it is in the cache.")
@click.option("--jobs", default=0, metavar="N", help="Parallel compiler processes.  [default: one for each CPU]")
def kernel(next_: bool, again: bool, jobs: int) -> None:
    """Build the full kernel, which has iommufd (about 8 minutes on 2 cores), or the next one.

    It cannot load modules. To build modules for the stock kernel, see kvmpass lab headers.
    """
    live = sys.stderr.isatty()

    def count(made: int) -> None:
        if live:
            click.echo(f"\r  {made} files", nl=False, err=True)
        elif made % 500 == 0:
            say(f"{made} files")

    built = build.build(kernels.NEXT if next_ else kernels.FULL, say, count, jobs=jobs, again=again)
    if live:
        click.echo(err=True)
    click.echo(f"{built.release}: {built.image}")


@lab.command()
@click.option("--again", is_flag=True, help="Fetch them even if they are in the cache.")
def headers(again: bool) -> None:
    """Fetch the stock kernel's headers, and print their directory.

    To build a module for the lab's hosts, and for guests in them:

    \b
      make -C "$(kvmpass lab headers)" M="$PWD" modules
    """
    click.echo(kernel_headers.fetch(say, again=again))


@lab.command()
@click.option("--again", is_flag=True, help="Fetch it even if it is in the cache.")
def qemu(again: bool) -> None:
    """Fetch the modern QEMU, which has root ports, virtual functions and fault events."""
    emulator = modern.fetch(say, again=again)
    click.echo(f"QEMU {emulator.version_text}: {emulator.path}")


@lab.command()
@click.argument("names", nargs=-1, metavar="[NAME]…", shell_complete=complete_selftest)
@click.option(
    "--kernel-tree",
    "tree",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Build the tests of this kernel source, instead of those of Linux 7.3.",
)
@click.option(
    "--kernel",
    default="next",
    show_default=True,
    metavar="stock|full|next|PATH",
    shell_complete=complete_kernel,
    help=KERNEL_HELP,
)
@click.option("--again", is_flag=True, help="Build them even if they are in the cache.")
@click.option("--timeout", type=float, metavar="SECONDS", help="End the run after this time, boot included.")
def selftests(names: tuple[str, ...], tree: Path | None, kernel: str, again: bool, timeout: float | None) -> int:
    """Run the kernel's VFIO selftests NAME in an emulated host, or all of them, and print TAP.

    They are built at first use. The host has an igb and an edu, bound to vfio-pci.

    Exit status 0 if nothing failed, 1 if a test did, otherwise as that of lab run.
    """
    built = kernel_selftests.build(say, tree, again=again)
    chosen = kernel_selftests.choose(built, names)
    config = kernel_selftests.configuration(kernel, timeout)
    result, verdicts = kernel_selftests.run(built, chosen, config, sys.stdout.buffer, say)
    say(kernel_selftests.summary(verdicts))
    if result.outcome != "exited" or result.status:
        return conclude(result)
    return int(len(verdicts) < len(chosen) or any(verdict.outcome == "failed" for verdict in verdicts))


@lab.command()
def clean() -> None:
    """Remove the cache: kernels, headers, initramfs images, the modern QEMU."""
    freed = cache.clean()
    click.echo(f"{cache.cache_root()}: {freed / 1e6:.0f} MB freed")
