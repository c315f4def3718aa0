"""Guests that stay, for tests of what runs in them and of what ends them."""

from __future__ import annotations

import json
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


def zeroes(guest: str) -> subprocess.Popen[bytes]:
    """A command that writes zeroes for ever, whose output is read once it comes."""
    process = subprocess.Popen(kvmpass("exec", guest, "--", "cat", "/dev/zero"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(MEBIBYTE) == bytes(MEBIBYTE)
    return process
