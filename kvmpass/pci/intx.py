"""INTx in the guest: one level-triggered line, without an exit to us.

VFIO masks the line in the device and signals an eventfd; KVM raises the guest's IOAPIC input. When the guest ends the
interrupt KVM signals the resample descriptor, on which VFIO unmasks: a device that still asserts its pin interrupts
again (Documentation/virt/kvm/api.rst, KVM_IRQFD_FLAG_RESAMPLE).
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from kvmpass._ratelimit import limited_log
from kvmpass._teardown import run_all
from kvmpass.kvm import Vm
from kvmpass.pci.function import PinSink

log = limited_log(__name__)


class Intx:
    """The function's pin, routed to ``gsi``. Synchronization: called with the bus lock held."""

    def __init__(self, vm: Vm, sink: PinSink, gsi: int) -> None:
        self._vm = vm
        self._sink = sink
        self._gsi = gsi
        self._eventfds: tuple[int, int] | None = None  # what the sink signals, and what makes it unmask the pin
        self._heard = False  # whether KVM has them
        self._signalled = False  # whether the sink has them

    @property
    def active(self) -> bool:
        """Whether an interrupt of the device reaches the guest."""
        return self._heard and self._signalled

    def enable(self) -> None:
        """Raises ``OSError`` (``EBUSY``: a host driver shares the line and the device cannot mask its own)."""
        if self.active:
            return
        self.disable()  # what an earlier failure may have left
        with ExitStack() as undo:
            trigger, unmask = self._eventfds = _eventfd(undo), _eventfd(undo)
            undo.pop_all()
            undo.callback(self.disable)
            self._vm.irqfd_resample(trigger, self._gsi, unmask)
            self._heard = True
            self._signalled = True  # turning it off is harmless if the next step fails
            self._sink.set_irqs(0, [trigger])
            # An interrupt that came in between has signalled the descriptor: the sink looks when it gets it.
            self._sink.set_unmask_eventfd(unmask)
            undo.pop_all()

    def disable(self) -> None:
        """The sink first, then KVM. Runs every step even if one fails; idempotent.

        Raises ``OSError``: what failed stays as it is, and ``disable`` can be called again.
        """
        run_all((self._stop_signalling, self._stop_hearing))
        eventfds, self._eventfds = self._eventfds, None
        for eventfd in eventfds or ():
            os.close(eventfd)

    def _stop_signalling(self) -> None:
        if self._signalled:
            self._sink.disable_irqs()
            self._signalled = False

    def _stop_hearing(self) -> None:
        if self._heard and self._eventfds:
            if not self._vm.closed:  # a VM takes its irqfds with it
                self._vm.irqfd_deassign(self._eventfds[0], self._gsi)
            self._heard = False


def _eventfd(undo: ExitStack) -> int:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    undo.callback(os.close, eventfd)
    return eventfd
