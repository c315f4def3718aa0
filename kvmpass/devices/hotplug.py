"""Plugging and unplugging as the guest hears of it: three registers that the DSDT's methods read and write.

The ACPI event device (ACPI 6.5, section 5.6.9) raises an interrupt; its ``_EVT`` method reads which slots have got a
device (a device check each) and which should let go of theirs (an eject request each); a slot's ``_EJ0`` writes its
bit when the guest's driver has let go.
"""

from __future__ import annotations

from collections.abc import Callable

UP, DOWN, EJECT = 0, 4, 8  # offsets of the 32-bit registers, one bit for each slot
SLOTS = 32


class HotplugController:
    """A bus device of twelve bytes. Reading ``UP`` or ``DOWN`` clears it.

    ``set_irq`` drives the event's edge-triggered line; ``on_eject`` is called with a slot from the vCPU thread whose
    guest ejects it. All methods are called with the bus lock held.
    """

    def __init__(self, set_irq: Callable[[bool], None], on_eject: Callable[[int], None]) -> None:
        self._set_irq = set_irq
        self._on_eject = on_eject
        self._up = self._down = 0

    def announce(self, slot: int) -> None:
        """A device has come to ``slot``."""
        self._up |= 1 << slot
        self.remind()

    def request_eject(self, slot: int) -> None:
        """The guest should let go of what is in ``slot``."""
        self._down |= 1 << slot
        self.remind()

    def forget(self, slot: int) -> None:
        """The slot is empty: nothing is wanted of the guest any more."""
        self._up &= ~(1 << slot)
        self._down &= ~(1 << slot)

    def remind(self) -> None:
        """Interrupt again for what the guest has not read: a line without a driver yet has lost its edge."""
        if self._up | self._down:
            self._set_irq(True)
            self._set_irq(False)

    def read(self, offset: int, size: int) -> bytes:
        if size != 4 or offset not in (UP, DOWN):
            return bytes(size)
        value = self._up if offset == UP else self._down
        if offset == UP:
            self._up = 0
        else:
            self._down = 0
        return value.to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> None:
        if offset == EJECT and len(data) == 4:
            value = int.from_bytes(data, "little")
            for slot in range(SLOTS):
                if value >> slot & 1:
                    self._on_eject(slot)
