"""Devices on a bus: what a guest accesses by port number or by guest-physical address."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Protocol

from kvmpass._log import Log
from kvmpass.errors import LayoutError

log = Log(__name__)


class BusDevice(Protocol):
    """A device at a range of a bus. Offsets are relative to that range, accesses inside. Nothing may raise.

    Synchronization: from vCPU threads, one call at a time for each bus (the bus lock).
    """

    def read(self, offset: int, size: int) -> bytes:
        """Read exactly ``size`` bytes: 1, 2, 4 or 8."""

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data``: 1, 2, 4 or 8 bytes."""


Label = str | Callable[[int], str]
"""What is at a range, for statistics, or a function that says it of an offset: a few words for each device."""


class Bus:
    """Non-overlapping ranges of ports or of guest-physical addresses, each with its device.

    Addresses without a device read as ones, writes to them are dropped, as on a PC.

    Synchronization: with the bus lock held.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        """What its addresses are, for messages: ``port`` or ``memory``."""
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, BusDevice, Label]] = []

    def add(self, start: int, size: int, device: BusDevice, label: Label = "a device") -> None:
        """Add a device at ``size`` addresses from ``start`` on. Raises ``LayoutError`` if they overlap another's."""
        at = bisect.bisect_left(self._starts, start)
        before = self._ranges[at - 1] if at else None
        after = self._ranges[at] if at < len(self._ranges) else None
        if (before and before[0] + before[1] > start) or (after and start + size > after[0]):
            raise LayoutError(f"{self.name} {start:#x}+{size:#x} overlaps another device")
        self._starts.insert(at, start)
        self._ranges.insert(at, (start, size, device, label))

    def remove(self, device: BusDevice) -> None:
        """Remove every range of ``device``."""
        self._ranges = [entry for entry in self._ranges if entry[2] is not device]
        self._starts = [entry[0] for entry in self._ranges]

    def _find(self, address: int, size: int) -> tuple[int, BusDevice] | None:
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        start, length, device, _ = self._ranges[at]
        if address + size > start + length:
            return None
        return address - start, device

    def label(self, address: int) -> str:
        """Return what is at ``address``, for statistics."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            start, length, _, label = self._ranges[at]
            if address < start + length:
                return label if isinstance(label, str) else label(address - start)
        return f"{self.name} without a device"

    def read(self, address: int, size: int) -> bytes:
        """Read from the device that has all of the range; ones without a device."""
        found = self._find(address, size)
        if found is None:
            log.debug("%s read of %#x (%d bytes): no device", self.name, address, size)
            return b"\xff" * size
        return found[1].read(found[0], size)

    def write(self, address: int, data: bytes) -> None:
        """Write to the device that has all of the range; dropped without a device."""
        found = self._find(address, len(data))
        if found is None:
            log.debug("%s write to %#x (%d bytes): no device", self.name, address, len(data))
            return
        found[1].write(found[0], data)
