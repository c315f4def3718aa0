"""MSI-X of an assigned function: the table that the guest sees, and its vectors as irqfds with GSI routes.

The device's own table belongs to the host (VFIO programs it, through the interrupt remapping tables); the guest's is
here. An unmasked vector is an eventfd that VFIO signals and KVM turns into the guest's message, all in the kernel.
A masked vector keeps its eventfd, which remembers what the device raised until the guest unmasks it.
(PCI Local Bus 3.0, section 6.8.2.)
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from kvmpass.kvm import IrqRoutes, Vm
from kvmpass.vfio import Device
from kvmpass.vfio.device import MSIX

log = logging.getLogger(__name__)

ENTRY_SIZE = 16
CONTROL_ENABLE = 1 << 15
CONTROL_MASK_ALL = 1 << 14
_VECTOR_MASKED = 1
_MSI_WINDOW = 0xFEE  # address bits 31:20 of every x86 message


@dataclass(slots=True)
class _Vector:
    entry: bytearray = field(default_factory=lambda: bytearray(b"\0" * 12 + b"\1\0\0\0"))
    eventfd: int = -1
    gsi: int = -1  # its route, while KVM listens
    message: tuple[int, int] = (0, 0)
    signalled: bool = False  # VFIO signals the eventfd

    @property
    def masked(self) -> bool:
        return bool(self.entry[12] & _VECTOR_MASKED)

    def wanted_message(self) -> tuple[int, int]:
        return int.from_bytes(self.entry[:8], "little"), int.from_bytes(self.entry[8:12], "little")


class Msix:
    """The function's vectors. Calls come from one thread at a time and never raise for what a guest writes."""

    def __init__(self, vm: Vm, routes: IrqRoutes, device: Device, vectors: int) -> None:
        self._vm = vm
        self._routes = routes
        self._device = device
        self._vectors = [_Vector() for _ in range(vectors)]
        self._resizable = device.irqs[MSIX].resizable
        self._enabled = False
        self._mask_all = False

    @property
    def table_size(self) -> int:
        """Bytes."""
        return len(self._vectors) * ENTRY_SIZE

    @property
    def active(self) -> int:
        """How many vectors reach the guest now."""
        return sum(vector.gsi >= 0 for vector in self._vectors)

    def read(self, offset: int, size: int) -> bytes:
        """Of the table. ``offset + size`` is inside it."""
        return b"".join(
            bytes(self._vectors[at // ENTRY_SIZE].entry[at % ENTRY_SIZE : at % ENTRY_SIZE + 1])
            for at in range(offset, offset + size)
        )

    def write(self, offset: int, data: bytes) -> None:
        """To the table; only aligned dwords and quadwords are defined, others are dropped."""
        if len(data) not in (4, 8) or offset % len(data):
            return
        number, at = divmod(offset, ENTRY_SIZE)
        vector = self._vectors[number]
        vector.entry[at : at + len(data)] = data
        self._update(number)

    def set_control(self, value: int) -> None:
        """The guest wrote the capability's message control."""
        self._mask_all = bool(value & CONTROL_MASK_ALL)
        enable = bool(value & CONTROL_ENABLE)
        if enable and not self._enabled:
            self._enabled = True
            self._signal(0)  # turns MSI-X on in the device
        elif self._enabled and not enable:
            try:
                self.disable()
            except OSError as error:
                log.debug("%s MSI-X: %s", self._device.name, error)
        for number in range(len(self._vectors)):
            self._update(number)

    def disable(self) -> None:
        """Routes and irqfds down, then the device's MSI-X off. Every step is tried."""
        self._enabled = False
        with ExitStack() as steps:
            for vector in self._vectors:
                if vector.eventfd >= 0:
                    steps.callback(self._forget, vector)
            if any(vector.signalled for vector in self._vectors):
                steps.callback(self._device.disable_irqs, MSIX)
            for vector in self._vectors:
                if vector.gsi >= 0:
                    steps.callback(self._disconnect, vector)

    @staticmethod
    def _forget(vector: _Vector) -> None:
        eventfd, vector.eventfd, vector.signalled = vector.eventfd, -1, False
        os.close(eventfd)

    def reset(self) -> None:
        """As after power on: disabled, all masked."""
        self.disable()
        self._mask_all = False
        for vector in self._vectors:
            vector.entry[:] = _Vector().entry

    # --- one vector

    def _update(self, number: int) -> None:
        vector = self._vectors[number]
        wanted = self._enabled and not self._mask_all and not vector.masked
        try:
            if vector.gsi >= 0 and (not wanted or vector.message != vector.wanted_message()):
                self._disconnect(vector)
            if wanted and vector.gsi < 0:
                self._connect(number)
        except OSError as error:
            log.debug("%s MSI-X vector %d: %s", self._device.name, number, error)

    def _connect(self, number: int) -> None:
        vector = self._vectors[number]
        address, data = vector.wanted_message()
        if address >> 20 != _MSI_WINDOW:
            log.debug("%s MSI-X vector %d: no message address: %#x", self._device.name, number, address)
            return
        self._signal(number)
        if vector.eventfd < 0:
            return
        with ExitStack() as undo:
            gsi = self._routes.add(address, data)
            undo.callback(self._routes.remove, gsi)
            self._vm.irqfd(vector.eventfd, gsi)
            undo.pop_all()
        vector.gsi, vector.message = gsi, (address, data)

    def _disconnect(self, vector: _Vector) -> None:
        gsi, vector.gsi = vector.gsi, -1
        with ExitStack() as steps:
            steps.callback(self._routes.remove, gsi)
            steps.callback(self._vm.irqfd_deassign, vector.eventfd, gsi)

    def _signal(self, number: int) -> None:
        """Let VFIO signal the vector's eventfd. Kernels before 6.5 take new vectors only all at once."""
        vector = self._vectors[number]
        if vector.signalled:
            return
        on = any(other.signalled for other in self._vectors)
        try:
            if vector.eventfd < 0:
                vector.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if self._resizable or not on:
                first = number if on else 0
                self._device.set_irqs(MSIX, first, [v.eventfd for v in self._vectors[first : number + 1]])
            else:
                self._signal_all()
            vector.signalled = True
        except OSError as error:
            log.debug("%s MSI-X vector %d: %s", self._device.name, number, error)
            if vector.eventfd >= 0:
                self._forget(vector)
            if on and not self._resizable:
                with suppress(OSError):
                    self._signal_all()  # the others, as before

    def _signal_all(self) -> None:
        last = max(n for n, v in enumerate(self._vectors) if v.eventfd >= 0)
        self._device.disable_irqs(MSIX)
        self._device.set_irqs(MSIX, 0, [v.eventfd for v in self._vectors[: last + 1]])
