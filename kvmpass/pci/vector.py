"""One message-signalled interrupt: an eventfd that its sink signals and KVM turns into the guest's message."""

from __future__ import annotations

import os
import select
from contextlib import ExitStack

from kvmpass.kvm import IrqRoutes, Vm

_MESSAGE_WINDOW = 0xFEE  # address bits 63:20 of every x86 message (AMD64 manual volume 2, section 16.11)


def is_message(address: int) -> bool:
    """Whether a write to ``address`` is an interrupt; everything else that a guest may name is memory."""
    return address >> 20 == _MESSAGE_WINDOW


class MessageVector:
    """Connected, KVM listens; disconnected, the eventfd remembers what the device raised (the pending bit).

    The route comes before the irqfd and goes after it: an irqfd without a route has crashed AMD hosts with AVIC. What
    KVM does not undo stays recorded, its route and its eventfd with it, and is tried again by the next call.

    Synchronization: called with the bus lock held.
    """

    def __init__(self, vm: Vm, routes: IrqRoutes) -> None:
        self._vm = vm
        self._routes = routes
        self._eventfd = -1
        self._gsi = -1  # the route
        self._heard = False  # whether KVM has the eventfd: the irqfd
        self._message = (0, 0)

    @property
    def open(self) -> bool:
        """Whether there is an eventfd."""
        return self._eventfd >= 0

    @property
    def eventfd(self) -> int:
        """For the sink to signal; made when first asked for."""
        if self._eventfd < 0:
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._eventfd

    @property
    def connected(self) -> bool:
        return self._heard

    @property
    def pending(self) -> bool:
        """Raised by the device, and not yet delivered because the guest masks it."""
        if self._eventfd < 0 or self._heard:
            return False
        poll = select.poll()
        poll.register(self._eventfd, select.POLLIN)
        return bool(poll.poll(0))

    def connect(self, address: int, data: int) -> None:
        """Deliver ``data`` to ``address`` from now on. Raises ``OSError`` if KVM refuses."""
        if self._heard and self._message == (address, data):
            return
        self.disconnect()
        self._gsi = self._routes.add(address, data)
        self._message = (address, data)
        with ExitStack() as undo:
            undo.callback(self.disconnect)
            self._vm.irqfd(self.eventfd, self._gsi)
            self._heard = True
            undo.pop_all()

    def disconnect(self) -> None:
        """Stop listening, then drop the route; idempotent. Raises ``OSError``: what failed stays as it is."""
        if self._heard:
            if not self._vm.closed:  # a VM takes its irqfds with it
                self._vm.irqfd_deassign(self._eventfd, self._gsi)
            self._heard = False
        if self._gsi >= 0:
            self._routes.remove(self._gsi)
            self._gsi = -1

    def close(self) -> None:
        """Disconnect, and close the eventfd: the sink must not signal it any more. Raises as ``disconnect`` does."""
        try:
            self.disconnect()
        finally:
            if self._eventfd >= 0 and not self._heard:
                os.close(self._eventfd)
                self._eventfd = -1
