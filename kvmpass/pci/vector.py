"""One message-signalled interrupt: an eventfd that the sink signals, and that KVM delivers as the guest's message."""

from __future__ import annotations

import os
import select

from kvmpass._teardown import undo_on_error
from kvmpass.kvm import IrqRoutes, Vm

_MESSAGE_WINDOW = 0xFEE  # address bits 63:20 of every x86 message (AMD64 manual volume 2, section 16.11)


def is_message(address: int) -> bool:
    """Whether a write to ``address`` is an interrupt; at any other address it is a write to memory."""
    return address >> 20 == _MESSAGE_WINDOW


class MessageVector:
    """While connected, the eventfd is an irqfd of KVM; otherwise it counts what the device raises (the pending bit).

    The route is added before the irqfd and removed after it: an irqfd without a route has crashed AMD hosts with
    AVIC. What KVM does not undo stays recorded, with its route and its eventfd, for the next call.

    Synchronization: with the bus lock held.
    """

    def __init__(self, vm: Vm, routes: IrqRoutes) -> None:
        self._vm = vm
        self._routes = routes
        self._eventfd = -1
        self._gsi = -1  # of the route
        self._assigned = False  # the irqfd, in KVM
        self._message = (0, 0)

    @property
    def open(self) -> bool:
        """Whether the eventfd exists."""
        return self._eventfd >= 0

    @property
    def eventfd(self) -> int:
        """What the sink signals; the first access creates it. Raises ``OSError``."""
        if self._eventfd < 0:
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._eventfd

    @property
    def connected(self) -> bool:
        """Whether KVM delivers it."""
        return self._assigned

    @property
    def pending(self) -> bool:
        """Whether the device has raised it while the guest masks it."""
        if self._eventfd < 0 or self._assigned:
            return False
        poll = select.poll()
        poll.register(self._eventfd, select.POLLIN)
        return bool(poll.poll(0))

    def connect(self, address: int, data: int) -> None:
        """Deliver it as ``data`` to ``address``. Idempotent. Raises ``OSError`` if KVM refuses."""
        if self._assigned and self._message == (address, data):
            return
        self.disconnect()
        self._gsi = self._routes.add(address, data)
        self._message = (address, data)
        with undo_on_error(self.disconnect):
            self._vm.irqfd(self.eventfd, self._gsi)
            self._assigned = True

    def disconnect(self) -> None:
        """Remove the irqfd, then the route. Idempotent. Raises ``OSError``: what failed stays as it is."""
        if self._assigned:
            if not self._vm.closed:  # a closed VM has no irqfds
                self._vm.irqfd_deassign(self._eventfd, self._gsi)
            self._assigned = False
        if self._gsi >= 0:
            self._routes.remove(self._gsi)
            self._gsi = -1

    def close(self) -> None:
        """Disconnect, and close the eventfd, which the sink no longer signals. Raises as ``disconnect`` does."""
        try:
            self.disconnect()
        finally:
            if self._eventfd >= 0 and not self._assigned:
                os.close(self._eventfd)
                self._eventfd = -1
