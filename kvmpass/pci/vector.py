"""One message-signalled interrupt: an eventfd that VFIO signals and KVM turns into the guest's message."""

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

    The route comes before the irqfd and goes after it: an irqfd without a route has crashed AMD hosts with AVIC.
    """

    def __init__(self, vm: Vm, routes: IrqRoutes) -> None:
        self._vm = vm
        self._routes = routes
        self._eventfd = -1
        self._gsi = -1
        self._message = (0, 0)

    @property
    def open(self) -> bool:
        """Whether there is an eventfd."""
        return self._eventfd >= 0

    @property
    def eventfd(self) -> int:
        """For VFIO to signal; made when first asked for."""
        if self._eventfd < 0:
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._eventfd

    @property
    def connected(self) -> bool:
        return self._gsi >= 0

    @property
    def pending(self) -> bool:
        """Raised by the device, and not yet delivered because the guest masks it."""
        if self._eventfd < 0 or self._gsi >= 0:
            return False
        poll = select.poll()
        poll.register(self._eventfd, select.POLLIN)
        return bool(poll.poll(0))

    def connect(self, address: int, data: int) -> None:
        """Deliver ``data`` to ``address`` from now on. Raises ``OSError`` if KVM refuses; then nothing is left."""
        if self.connected:
            if self._message == (address, data):
                return
            self.disconnect()
        with ExitStack() as undo:
            gsi = self._routes.add(address, data)
            undo.callback(self._routes.remove, gsi)
            self._vm.irqfd(self.eventfd, gsi)
            undo.pop_all()
        self._gsi, self._message = gsi, (address, data)

    def disconnect(self) -> None:
        """Both steps are tried. Harmless where nothing is connected."""
        gsi, self._gsi = self._gsi, -1
        if gsi >= 0:
            with ExitStack() as steps:
                steps.callback(self._routes.remove, gsi)
                steps.callback(self._vm.irqfd_deassign, self._eventfd, gsi)

    def close(self) -> None:
        """VFIO must have let go of the eventfd before. Every step is tried."""
        with ExitStack() as steps:
            steps.callback(self._forget)
            steps.callback(self.disconnect)

    def _forget(self) -> None:
        eventfd, self._eventfd = self._eventfd, -1
        if eventfd >= 0:
            os.close(eventfd)
