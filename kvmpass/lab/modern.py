"""The modern QEMU: that of Debian 13's backports, unpacked with its libraries, without being installed."""

from __future__ import annotations

from pathlib import Path

from kvmpass.lab import debian
from kvmpass.lab.cache import Say, fill_directory
from kvmpass.lab.qemu import Emulator, modern, modern_root

PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")


def fetch(say: Say, *, again: bool = False) -> Emulator:
    """Return the modern QEMU, downloaded into the cache if it is missing, or if ``again``. Raises ``LabError``."""

    def unpack(draft: Path) -> None:
        debian.unpack_with_dependencies(PACKAGES, debian.BACKPORTS, draft, say)

    fill_directory(modern_root(), unpack, "qemu", say, again=again)
    return modern()
