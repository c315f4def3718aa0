"""Counts of KVM's tracepoints, whichever program runs the guest: perf_event_open(2) on each CPU, as root."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

EVENTS = Path("/sys/kernel/tracing/events")
# The reasons are KVM_EXIT_… (include/uapi/linux/kvm.h).
KVM: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "exits to user space": ("kvm/kvm_userspace_exit", ""),
        "of them ports": ("kvm/kvm_userspace_exit", "reason == 2"),
        "of them MMIO": ("kvm/kvm_userspace_exit", "reason == 6"),
        "exits to KVM": ("kvm/kvm_exit", ""),
        "MSIs": ("kvm/kvm_msi_set_irq", ""),
    }
)
_PERF_EVENT_OPEN = 298  # x86-64
_TRACEPOINT, _ATTR_SIZE, _CLOSE_ON_EXEC = 2, 64, 8
_SET_FILTER = 0x40082406  # PERF_EVENT_IOC_SET_FILTER


class Counters:
    """Counts tracepoints of the whole host from its construction on. ``with`` or ``close()`` ends it.

    ``events``: tracepoint and filter by name. Raises ``OSError`` (no tracefs, or not root).
    """

    def __init__(self, events: Mapping[str, tuple[str, str]] = KVM) -> None:
        self._fds: dict[str, list[int]] = {name: [] for name in events}
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            for name, (event, condition) in events.items():
                number = int((EVENTS / event / "id").read_text())
                attr = struct.pack("<IIQQQQQ", _TRACEPOINT, _ATTR_SIZE, number, 0, 0, 0, 0).ljust(_ATTR_SIZE, b"\0")
                for cpu in sorted(os.sched_getaffinity(0)):
                    fd = libc.syscall(_PERF_EVENT_OPEN, attr, -1, cpu, -1, _CLOSE_ON_EXEC)
                    if fd < 0:
                        raise OSError(ctypes.get_errno(), f"perf_event_open: {event}")
                    self._fds[name].append(fd)
                    if condition and libc.ioctl(fd, _SET_FILTER, condition.encode()):
                        raise OSError(ctypes.get_errno(), f"PERF_EVENT_IOC_SET_FILTER: {condition}")
        except BaseException:
            self.close()
            raise

    def read(self) -> dict[str, int]:
        """Return the counts so far."""
        return {name: sum(int.from_bytes(os.read(fd, 8), "little") for fd in fds) for name, fds in self._fds.items()}

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        for fds in self._fds.values():
            while fds:
                os.close(fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
