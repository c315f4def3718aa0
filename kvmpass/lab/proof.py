"""Evidence that the emulated IOMMU translates: QEMU's trace of it while the host's drivers start.

Each emulated host has a SATA controller on bus 0, which writes to memory when its driver starts. If the IOMMU
translates, QEMU's trace has that access with an address that differs from the one the device used.
"""

from __future__ import annotations

import json
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from kvmpass._lazy import lazy_pattern
from kvmpass.errors import LabError
from kvmpass.lab.cache import cache_root, write_atomic
from kvmpass.lab.command import TRACE_EVENT
from kvmpass.lab.kernels import Kernel
from kvmpass.lab.qemu import Emulator

SECONDS = 5.0

_LINE = lazy_pattern(rb"devid: ([0-9a-f:.]+) gpa 0x([0-9a-f]+) hpa 0x([0-9a-f]+)")
_BYPASSES = lazy_pattern(r"(?:^|\s)(?:iommu=(?:pt|off|soft)|iommu\.passthrough=1|amd_iommu=off)(?=\s|$)")


def bypassed(append: str) -> bool:
    """Return whether the kernel's command line disables the translation of its devices: evidence is impossible."""
    return _BYPASSES.search(append) is not None


def translations(trace: Path) -> int:
    """Return the number of accesses whose address differs from the one the device used."""
    count = 0
    with trace.open("rb") as file:
        for line in file:
            found = _LINE.search(line)
            if found:
                used, reached = int(found[2], 16), int(found[3], 16)
                count += reached not in (0, used)
    return count


def require(trace: Path, emulator: Emulator, kernel: Kernel) -> int:
    """Wait for the evidence, record it, and return the number of translations. Raises ``LabError`` without any."""
    deadline = time.monotonic() + SECONDS
    while not (count := translations(trace)) and time.monotonic() < deadline:
        time.sleep(0.1)
    note(emulator, kernel, count)
    if not count:
        raise LabError(
            f"DMA is not translated in this lab (QEMU {emulator.version_text}, kernel {kernel.release})",
            "use the system's QEMU 7.2 or --qemu modern: here a test would prove nothing",
        )
    return count


def stop_trace(control: socket.socket) -> None:
    """Disable the trace, which has a line for every four bytes. Raises ``LabError`` if QEMU refuses."""
    control.settimeout(10)
    off = {"name": TRACE_EVENT, "enable": False}
    for order in ({"execute": "qmp_capabilities"}, {"execute": "trace-event-set-state", "arguments": off}):
        control.sendall(json.dumps(order).encode())
    answers = b""
    while answers.count(b'"return"') < 2:
        data = control.recv(4096)
        if not data or b'"error"' in data:
            raise LabError("QEMU refuses to disable its trace")
        answers += data


def verdicts() -> dict[str, str]:
    """Return the last result for each QEMU and kernel."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def note(emulator: Emulator, kernel: Kernel, count: int) -> None:
    """Record a result for ``kvmpass lab status``."""
    verdict = f"translated ({count} times)" if count else "NOT TRANSLATED"
    key = f"QEMU {emulator.version_text} ({emulator.name}), kernel {kernel.release}"
    text = f"{verdict} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    write_atomic(_file(), json.dumps(verdicts() | {key: text}, indent=1).encode())


def _file() -> Path:
    return cache_root() / "verdicts.json"
