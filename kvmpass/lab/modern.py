"""The modern QEMU line: Debian 13's backports, unpacked beside the machine's own libraries, never installed."""

from __future__ import annotations

from kvmpass.lab import debian
from kvmpass.lab.cache import Say, locked, new_directory
from kvmpass.lab.qemu import Emulator, modern, modern_root

PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
SUITES = ("trixie", "trixie-backports")


def fetch(say: Say, *, again: bool = False) -> Emulator:
    """Get the modern QEMU into the cache, unless it is there. Raises ``LabError`` if it cannot be had."""
    with locked("qemu", say):
        if again or not modern_root().is_dir():
            with new_directory(modern_root()) as draft:
                debian.unpack_with_dependencies(PACKAGES, SUITES, draft, say)
    return modern()
