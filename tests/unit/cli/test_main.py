"""The group of subcommands: its help and the completion of its names load none of them."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

from kvmpass.cli.main import COMMANDS, COMPLETE, kvmpass

# Each costs a millisecond or more, and none is needed to print a help.
NOT_NEEDED = {"json", "logging", "traceback", "pathlib", "dataclasses", "importlib.metadata"}


def loaded(*words: str, **environment: str) -> set[str]:
    """Return the modules that a command line has loaded at its end, in a process of its own."""
    script = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    script += "from kvmpass.cli.main import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path}; {script}", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "assign" in done.stdout
    return set(done.stderr.split())


def own(modules: set[str]) -> set[str]:
    """Return the modules of kvmpass among ``modules``."""
    return {name for name in modules if name.startswith("kvmpass.")}


def test_the_help_loads_no_command() -> None:
    modules = loaded("--help")
    assert own(modules) == {
        "kvmpass._lazy",
        "kvmpass._log",
        "kvmpass._signals",
        "kvmpass.cli",
        "kvmpass.cli.main",
        "kvmpass.cli.output",
        "kvmpass.errors",
    }
    assert not modules & NOT_NEEDED


def test_completing_a_command_loads_no_command() -> None:
    modules = loaded(**{COMPLETE: "bash_complete", "COMP_WORDS": "kvmpass a"})
    assert not own(modules) & {module for module, _ in COMMANDS.values() if module != "kvmpass.cli.completion"}
    assert "kvmpass.host" not in modules


def test_imports_are_not_searched_for_garbage() -> None:
    """Of the command: what a program that imports kvmpass wants is its own matter."""
    script = "import atexit, gc, sys; usual = gc.get_threshold(); import kvmpass; "
    script += "assert gc.get_threshold() == usual; "
    script += "collected = lambda: sum(generation['collections'] for generation in gc.get_stats()); "
    script += "from kvmpass.__main__ import main; gc.collect(); before = collected(); "
    script += "atexit.register(lambda: print(collected() - before, file=sys.stderr)); main()"
    words = [sys.executable, "-c", script, "assign", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--kernel" in done.stdout and done.stderr == "0\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_in_the_table_is_the_commands_own(name: str) -> None:
    command = kvmpass.get_command(click.Context(kvmpass), name)
    assert command is not None
    assert not command.hidden
    assert COMMANDS[name][1] == command.get_short_help_str(200)


def imported(*names: str) -> set[str]:
    """Return the modules that ``names`` load beyond click, in a process of its own."""
    script = (
        f"import sys, click; before = {{*sys.modules}}; import {', '.join(names)}; print(*{{*sys.modules}} - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# What the steps of kvmpass.assignment.assign import, until a device is assigned.
STEPS = (
    "host.blockers",
    "host.doctor.vital",
    "machine.machine",
    "guest.image",
    "virtio.function",
    "virtio.console",
)
LATE = {"concurrent.futures", "dataclasses", "gzip", "json", "logging", "lzma", "shutil", "socket", "subprocess"}
LATE |= {"traceback", "pwd"}


def test_the_command_assign_loads_no_step_before_it_is_due() -> None:
    """Its options, and what maps memory: the rest is imported while that is populated."""
    modules = imported("kvmpass.cli.assign")
    assert not modules & {f"kvmpass.{name}" for name in STEPS} | modules & (LATE | {"termios"})
    packages = {".".join(name.split(".")[:2]) for name in own(modules)}
    assert not packages & {f"kvmpass.{name}" for name in ("board", "boot", "dma", "initramfs", "kvm", "pci", "vfio")}
    assert len(own(modules)) <= 42


def test_the_way_to_an_attached_device_loads_little() -> None:
    """Half of the time until a small guest has its device is spent on imports: what few runs need is loaded there."""
    modules = imported("kvmpass.cli.assign", *(f"kvmpass.{name}" for name in (*STEPS, "host.drivers.borrow")))
    assert not modules & LATE
    packages = {".".join(name.split(".")[:2]) for name in own(modules)}
    assert not packages & {f"kvmpass.{name}" for name in ("crash", "files", "session", "lab")}
    unused = (
        "guest.guest",
        "guest.directories",
        "host.doctor.catalogue",
        "host.usage.storage",
        "dma.iommufd",
        "kvm.vcpu",
        "machine.vcpus",
        "vfio.cdev",
    )
    assert not modules & {f"kvmpass.{name}" for name in unused}
    assert len(own(modules)) <= 158


def test_the_way_to_an_attached_device_makes_no_class_of_the_standard_librarys() -> None:
    """Nor the fields of one of ours: each takes as long as importing two modules."""
    names = ", ".join(f"kvmpass.{name}" for name in ("cli.assign", *STEPS, "host.drivers.borrow"))
    script = f"import dataclasses; dataclasses.dataclass = None; import {names}"
    subprocess.run([sys.executable, "-c", script], check=True)
