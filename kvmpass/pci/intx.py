"""INTx of an assigned function: one level-triggered line, without an exit to us.

VFIO masks the line in the device and signals an eventfd; KVM raises the guest's IOAPIC input. When the guest ends the
interrupt KVM signals the resample descriptor, on which VFIO unmasks: a device that still asserts its pin interrupts
again (Documentation/virt/kvm/api.rst, KVM_IRQFD_FLAG_RESAMPLE).
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack

from kvmpass.kvm import Vm
from kvmpass.vfio import Device
from kvmpass.vfio.device import INTX

log = logging.getLogger(__name__)


class Intx:
    """The function's pin, routed to ``gsi``. Calls come one at a time."""

    def __init__(self, vm: Vm, device: Device, gsi: int) -> None:
        self._vm = vm
        self._device = device
        self._gsi = gsi
        self._undo: ExitStack | None = None

    @property
    def active(self) -> bool:
        return self._undo is not None

    def enable(self) -> None:
        """Raises ``OSError`` (``EBUSY``: a host driver shares the line and the device cannot mask its own)."""
        if self.active:
            return
        with ExitStack() as undo:
            trigger = _eventfd(undo)
            unmask = _eventfd(undo)
            self._vm.irqfd_resample(trigger, self._gsi, unmask)
            undo.callback(self._vm.irqfd_deassign, trigger, self._gsi)
            undo.callback(self._device.disable_irqs, INTX)  # harmless if the next step fails
            self._device.set_irqs(INTX, 0, [trigger])
            # An interrupt that came in between has signalled the descriptor: VFIO looks when it gets it.
            self._device.set_unmask_eventfd(INTX, unmask)
            self._undo = undo.pop_all()

    def disable(self) -> None:
        """Every step is tried; raises ``OSError``. Harmless where it is off."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()


def _eventfd(undo: ExitStack) -> int:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    undo.callback(os.close, eventfd)
    return eventfd
