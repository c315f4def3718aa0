"""Power off and reset: the sleep and reset registers of the FADT (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from kvmpass import ports

SLEEP_ENABLE = 0x20
SLEEP_TYPE_SHIFT, SLEEP_TYPE_MASK = 2, 0x1C


class PowerEvent(Enum):
    """What the guest requests."""

    POWEROFF = "poweroff"
    """To enter S5."""
    RESET = "reset"
    """To be reset."""


class PowerControl:
    """A bus device with the sleep control, sleep status and reset registers (``kvmpass.ports``).

    ``on_event`` is called from the vCPU thread that requests it. Sleep types other than S5, and other reset values,
    are ignored.
    """

    def __init__(self, on_event: Callable[[PowerEvent], None]) -> None:
        self._on_event = on_event

    def read(self, offset: int, size: int) -> bytes:
        """Read zeros: the sleep status is that of a system that has not woken."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Power off, or reset."""
        for at, value in enumerate(data, offset):
            if at == ports.SLEEP_CONTROL - ports.POWER_BASE and value & SLEEP_ENABLE:
                if (value & SLEEP_TYPE_MASK) >> SLEEP_TYPE_SHIFT == ports.S5_TYPE:
                    self._on_event(PowerEvent.POWEROFF)
            elif at == ports.RESET - ports.POWER_BASE and value == ports.RESET_VALUE:
                self._on_event(PowerEvent.RESET)
