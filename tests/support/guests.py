"""Guests: by the command, and by the library in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpass.guest import Guest, GuestResult, GuestSpec, prepare
from kvmpass.machine import Machine

GUEST_SECONDS = 200


def kvmpass(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvmpass", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(kvmpass(*arguments), capture_output=True, timeout=GUEST_SECONDS, check=False)
    except subprocess.TimeoutExpired as hung:
        said = (hung.stderr or b"").decode(errors="replace")
        pytest.fail(f"no end after {GUEST_SECONDS} s; standard error so far:\n{said[-8000:]}", pytrace=False)


def boot(
    *command: str,
    append: str = "",
    cpus: int = 1,
    copy: tuple[str, ...] = (),
    kernel: Path | None = None,
    decompressed: bool = True,
) -> tuple[GuestResult, bytes]:
    """A guest from the library, in this process; its kernel ``decompressed`` here, or else in the guest."""
    output = bytearray()
    image = prepare(GuestSpec(command=command, append=append, copy=copy, kernel=kernel, kaslr=not decompressed), [])
    with (
        Machine(memory="192M", cpus=cpus) as machine,
        Guest(machine, console=None, output=output.extend, errors=output.extend) as guest,
    ):
        image.load(machine)
        if os.environ.get("KVMPASS_LAB"):  # elsewhere the kernel may be compressed in a way that Python does not know
            assert machine.kernel_decompressed == decompressed
        result = guest.run()
    return result, bytes(output)
