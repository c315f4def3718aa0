"""ACPI hotplug of PCI slots: three registers that the DSDT's methods read and write.

The generic event device (ACPI 6.5, section 5.6.9) has a level-triggered interrupt, asserted until its ``_EVT`` method
has read the slots to notify: device check after a device was added, eject request to eject one. So a driver that is
loaded later misses no event. When the guest ejects, the slot's ``_EJ0`` method writes its bit.
"""

from __future__ import annotations

from collections.abc import Callable

UP, DOWN, EJECT = 0, 4, 8  # offsets of the 32-bit registers, one bit for each slot
SLOTS = 32


class HotplugController:
    """A bus device of twelve bytes. Reading ``UP`` or ``DOWN`` clears it.

    ``set_irq`` is called when the interrupt's level changes; ``on_eject`` with the number of a slot, from the vCPU
    thread that ejects it.

    Synchronization: the bus lock is held in all methods.
    """

    def __init__(self, set_irq: Callable[[bool], None], on_eject: Callable[[int], None]) -> None:
        self._set_irq = set_irq
        self._on_eject = on_eject
        self._up = self._down = 0
        self._level = False

    def announce(self, slot: int) -> None:
        """Notify the guest of a device added to ``slot``."""
        self._up |= 1 << slot
        self._update()

    def request_eject(self, slot: int) -> None:
        """Request that the guest ejects the device in ``slot``."""
        self._down |= 1 << slot
        self._update()

    def withdraw(self, slot: int) -> None:
        """Withdraw the eject request of ``slot``."""
        self._down &= ~(1 << slot)
        self._update()

    def forget(self, slot: int) -> None:
        """Withdraw all notifications of ``slot``, whose device was removed."""
        self._up &= ~(1 << slot)
        self._down &= ~(1 << slot)
        self._update()

    def _update(self) -> None:
        level = bool(self._up | self._down)
        if level != self._level:
            self._level = level
            self._set_irq(level)

    def read(self, offset: int, size: int) -> bytes:
        """Read and clear ``UP`` or ``DOWN``; anything else reads as zero."""
        if size != 4 or offset not in (UP, DOWN):
            return bytes(size)
        if offset == UP:
            value, self._up = self._up, 0
        else:
            value, self._down = self._down, 0
        self._update()
        return value.to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write ``EJECT``; anything else is ignored."""
        if offset == EJECT and len(data) == 4:
            value = int.from_bytes(data, "little")
            for slot in range(SLOTS):
                if value >> slot & 1:
                    self._on_eject(slot)
