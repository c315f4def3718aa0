"""INTx in the guest: one level-triggered line, without exits.

VFIO masks INTx in the device and signals an eventfd; KVM asserts the guest's IOAPIC input. At the guest's EOI KVM
signals the resample eventfd, on which VFIO unmasks INTx: a device that still asserts it interrupts again
(Documentation/virt/kvm/api.rst, KVM_IRQFD_FLAG_RESAMPLE).
"""

from __future__ import annotations

import os

from kvmpass._teardown import run_all, undo_on_error
from kvmpass.kvm import Vm
from kvmpass.pci.function import PinSink


class Intx:
    """The function's INTx, routed to ``gsi``.

    Synchronization: with the bus lock held.
    """

    def __init__(self, vm: Vm, sink: PinSink, gsi: int) -> None:
        self._vm = vm
        self._sink = sink
        self._gsi = gsi
        self._eventfds: list[int] = []  # what the sink signals; what unmasks INTx
        self._assigned = False  # the irqfd, in KVM
        self._signalled = False  # the eventfds, in the sink

    @property
    def active(self) -> bool:
        """Whether an interrupt of the device reaches the guest."""
        return self._assigned and self._signalled

    def enable(self) -> None:
        """Connect INTx. Idempotent.

        Raises ``OSError`` (``EBUSY``: a host driver shares the line, and the device cannot mask its INTx).
        """
        if self.active:
            return
        self.disable()  # what an earlier failure may have left
        with undo_on_error(self.disable):
            for _ in range(2):
                self._eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            trigger, unmask = self._eventfds
            self._vm.irqfd_resample(trigger, self._gsi, unmask)
            self._assigned = True
            self._signalled = True  # disabling is idempotent if the next step fails
            self._sink.set_irqs(0, [trigger])
            # KVM may have signalled the descriptor already: the sink checks it now.
            self._sink.set_unmask_eventfd(unmask)

    def disable(self) -> None:
        """Disable the sink, then remove the irqfd. Runs every step even if one fails; idempotent.

        Raises ``OSError``: what failed stays as it is, and ``disable`` can be called again.
        """
        run_all(self._stop_signalling, self._deassign)
        while self._eventfds:
            os.close(self._eventfds.pop())

    def _stop_signalling(self) -> None:
        if self._signalled:
            self._sink.disable_irqs()
            self._signalled = False

    def _deassign(self) -> None:
        if self._assigned:
            if not self._vm.closed:  # a closed VM has no irqfds
                self._vm.irqfd_deassign(self._eventfds[0], self._gsi)
            self._assigned = False
