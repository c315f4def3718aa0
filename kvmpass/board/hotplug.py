"""Plugging and unplugging as the guest hears of it: three registers that the DSDT's methods read and write.

The ACPI event device (ACPI 6.5, section 5.6.9) has a level-triggered interrupt that lasts until its ``_EVT`` method
has read which slots have got a device (a device check each) and which should let go of theirs (an eject request
each): a guest whose driver comes later misses nothing. A slot's ``_EJ0`` writes its bit when the guest has let go.
"""

from __future__ import annotations

from collections.abc import Callable

UP, DOWN, EJECT = 0, 4, 8  # offsets of the 32-bit registers, one bit for each slot
SLOTS = 32


class HotplugController:
    """A bus device of twelve bytes. Reading ``UP`` or ``DOWN`` clears it.

    ``set_irq`` drives the event's line, when its level changes; ``on_eject`` is called with a slot from the vCPU
    thread whose guest ejects it. All methods are called with the bus lock held.
    """

    def __init__(self, set_irq: Callable[[bool], None], on_eject: Callable[[int], None]) -> None:
        self._set_irq = set_irq
        self._on_eject = on_eject
        self._up = self._down = 0
        self._level = False

    def announce(self, slot: int) -> None:
        """A device has come to ``slot``."""
        self._up |= 1 << slot
        self._update()

    def request_eject(self, slot: int) -> None:
        """The guest should let go of what is in ``slot``."""
        self._down |= 1 << slot
        self._update()

    def withdraw(self, slot: int) -> None:
        """The guest need not let go any more."""
        self._down &= ~(1 << slot)
        self._update()

    def forget(self, slot: int) -> None:
        """The slot is empty: nothing is wanted of the guest any more."""
        self._up &= ~(1 << slot)
        self._down &= ~(1 << slot)
        self._update()

    def _update(self) -> None:
        level = bool(self._up | self._down)
        if level != self._level:
            self._level = level
            self._set_irq(level)

    def read(self, offset: int, size: int) -> bytes:
        if size != 4 or offset not in (UP, DOWN):
            return bytes(size)
        value = self._up if offset == UP else self._down
        if offset == UP:
            self._up = 0
        else:
            self._down = 0
        self._update()
        return value.to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> None:
        if offset == EJECT and len(data) == 4:
            value = int.from_bytes(data, "little")
            for slot in range(SLOTS):
                if value >> slot & 1:
                    self._on_eject(slot)
