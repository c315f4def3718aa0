"""Guests that stay, for tests of what runs in them and of what ends them."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

from kvmpass import host
from support.guests import kvmpass, run

MEBIBYTE = 1 << 20


def driver(bdf: str) -> str | None:
    return host.Sysfs().driver(host.Bdf.parse(bdf))


def guests() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("ps", "--json").stdout)["guests"]
    return found


def worker(number: int) -> list[str]:
    """A command that writes its input, and its number to its errors; every tenth is ended by a signal."""
    end = "kill -TERM $$" if number % 10 == 9 else f"exit {number % 100}"
    return ["sh", "-c", f"cat; echo {number} >&2; {end}"]


def expected(number: int) -> int:
    """Its ``returncode``."""
    return -signal.SIGTERM if number % 10 == 9 else number % 100


def zeroes(guest: str) -> subprocess.Popen[bytes]:
    """A command that writes zeroes for ever, whose output is read once it comes."""
    process = subprocess.Popen(kvmpass("exec", guest, "--", "cat", "/dev/zero"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(MEBIBYTE) == bytes(MEBIBYTE)
    return process
