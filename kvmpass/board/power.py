"""Power off and reset: the ports that the FADT names (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

SLEEP_ENABLE = 0x20
SLEEP_TYPE_SHIFT, SLEEP_TYPE_MASK = 2, 0x1C


class PowerEvent(Enum):
    """What the guest asked for."""

    POWEROFF = "poweroff"
    RESET = "reset"


class PowerControl:
    """A bus device with the sleep control, sleep status and reset registers, at the given offsets.

    ``on_event`` is called from the vCPU thread whose guest asked. A sleep type other than ``s5_type`` and a reset
    value other than ``reset_value`` are ignored. Everything reads as zero: the guest never wakes from a sleep.
    """

    def __init__(
        self,
        on_event: Callable[[PowerEvent], None],
        *,
        sleep_control: int = 0,
        reset: int = 4,
        s5_type: int = 5,
        reset_value: int = 0x06,
    ) -> None:
        self._on_event = on_event
        self._sleep_control = sleep_control
        self._reset = reset
        self._s5_type = s5_type
        self._reset_value = reset_value

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        for at, value in enumerate(data, offset):
            if at == self._sleep_control and value & SLEEP_ENABLE:
                if (value & SLEEP_TYPE_MASK) >> SLEEP_TYPE_SHIFT == self._s5_type:
                    self._on_event(PowerEvent.POWEROFF)
            elif at == self._reset and value == self._reset_value:
                self._on_event(PowerEvent.RESET)
