"""What one run adds to the emulated host's first file system: its settings, and the command."""

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
    """A command for a lab, the ports it needs, and where its input comes from. ``terminal`` is rows and columns."""

    command: Sequence[str]
    cwd: Path
    env: Mapping[str, str]
    ports: tuple[str, ...]
    input: Literal["null", "pipe", "tty"] = "null"
    terminal: tuple[int, int] = (24, 80)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The command's environment: small, with this installation's programs first in ``PATH``."""
    values = {
        "HOME": "/root",
        "KVMPASS_LAB": "1",
        "LANG": "C.UTF-8",
        "LOGNAME": "root",
        # The interpreter that runs here, by its own path: a version manager's shim takes seconds under emulation.
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        # What a run would cache goes away with it.
        "PYTHONDONTWRITEBYTECODE": "1",
        "SHELL": "/bin/bash",
        "TERM": "linux",
        "USER": "root",
    }
    if "PYTHONPATH" in os.environ:
        values["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return values | dict(more or {})


def overlay(job: Job, kernel: Kernel, writable: Sequence[Path]) -> bytes:
    """A cpio archive with the first process and all it needs to know."""
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
    """A shell script that becomes the command; 127 and 126 as in a shell if it cannot, 125 without ``cwd``."""
    # By its path: a busybox would take its own programs before those in PATH.
    words = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in job.env.items()), *job.command]
    text = f"cd -- {shlex.quote(str(job.cwd))} || exit 125\nexec {shlex.join(words)}\n"
    return text.encode("utf-8", "surrogateescape")
