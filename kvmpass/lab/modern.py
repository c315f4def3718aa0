"""The modern QEMU: that of Debian 13's backports, unpacked with its libraries, without being installed."""

from __future__ import annotations

from kvmpass.lab import debian
from kvmpass.lab.cache import Say, locked, new_directory
from kvmpass.lab.qemu import Emulator, modern, modern_root

PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
SUITES = ("trixie", "trixie-backports")


def fetch(say: Say, *, again: bool = False) -> Emulator:
    """Return the modern QEMU, downloaded into the cache if it is missing, or if ``again``. Raises ``LabError``."""
    with locked("qemu", say):
        if again or not modern_root().is_dir():
            with new_directory(modern_root()) as draft:
                debian.unpack_with_dependencies(PACKAGES, SUITES, draft, say)
    return modern()
