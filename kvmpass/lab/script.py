"""The part of the initramfs that is made for one run: the first process, its settings, the command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from kvmpass.initramfs.cpio import newc
from kvmpass.lab.cache import SYSTEM_PATH
from kvmpass.lab.initrd import DIRECTORY, executable, regular
from kvmpass.lab.kernels import Kernel


@dataclass(frozen=True)
class Job:
    """A command for a lab."""

    command: Sequence[str]
    """The program and its arguments."""
    cwd: Path
    """Its working directory."""
    env: Mapping[str, str]
    """Its whole environment."""
    ports: tuple[str, ...]
    """Names of the virtio-serial ports that it needs."""
    input: Literal["null", "pipe", "tty"] = "null"
    """Its standard input."""
    terminal: tuple[int, int] = (24, 80)
    """Rows and columns of its terminal."""


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the command's environment: a small one, with this installation's programs first in ``PATH``."""
    values = {
        "HOME": "/root",
        "KVMPASS_LAB": "1",
        "LANG": "C.UTF-8",
        "LOGNAME": "root",
        # The directory of this very interpreter: a version manager's shim would take seconds under emulation.
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        # Byte code would be lost at the end of the run.
        "PYTHONDONTWRITEBYTECODE": "1",
        "SHELL": "/bin/bash",
        "TERM": "linux",
        "USER": "root",
    }
    if "PYTHONPATH" in os.environ:
        values["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return values | dict(more or {})


def overlay(job: Job, kernel: Kernel, writable: Sequence[Path]) -> bytes:
    """Return a cpio archive with the first process and its settings."""
    settings = {
        "INPUT": job.input,
        "KERNEL_CONFIG": kernel.config or "",
        "KERNEL_IMAGE": kernel.image,
        "KERNEL_MODULES": kernel.modules or "",
        "PORTS": " ".join(job.ports),
        "TERMINAL_SIZE": f"rows {job.terminal[0]} cols {job.terminal[1]}",
    }
    lines = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items())
    nodes = {
        "init": executable(files("kvmpass.lab").joinpath("init.sh").read_bytes()),
        "lab": DIRECTORY,
        "lab/command": regular(command_script(job)),
        "lab/settings": regular(lines.encode()),
        "lab/writable": regular("".join(f"{path}\n" for path in writable).encode()),
    }
    return newc(nodes.items())


def command_script(job: Job) -> bytes:
    """Return a shell script that executes the command. Its exit status is 125 if ``cwd`` is missing."""
    # By its path: busybox would prefer its own env.
    words = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in job.env.items()), *job.command]
    text = f"cd -- {shlex.quote(str(job.cwd))} || exit 125\nexec {shlex.join(words)}\n"
    return text.encode("utf-8", "surrogateescape")
