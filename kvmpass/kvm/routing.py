"""The VM's table of GSI routes, which KVM takes only as a whole."""

from __future__ import annotations

import errno
import threading

from kvmpass._native import lib
from kvmpass.kvm.vm import ChipRoute, MsiRoute, Vm

IOAPIC_PINS = 24
_PIC_PINS = 16


class IrqRoutes:
    """IOAPIC and PIC pins as on a PC, and GSIs above them for message-signalled interrupts.

    A change takes effect at once; one that KVM refuses leaves the table as it was.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._limit = vm.check_extension(lib.KVM_CAP_IRQ_ROUTING)
        self._msi: dict[int, MsiRoute] = {}
        self._lock = threading.Lock()
        self._chips = [ChipRoute(pin, lib.KVM_IRQCHIP_IOAPIC, pin) for pin in range(IOAPIC_PINS)]
        self._chips += [
            ChipRoute(pin, lib.KVM_IRQCHIP_PIC_MASTER if pin < 8 else lib.KVM_IRQCHIP_PIC_SLAVE, pin % 8)
            for pin in range(_PIC_PINS)
        ]
        self._set(self._msi)

    @property
    def msi(self) -> list[MsiRoute]:
        """The routes above the chips' pins, by GSI."""
        with self._lock:
            return sorted(self._msi.values(), key=lambda route: route.gsi)

    def _set(self, msi: dict[int, MsiRoute]) -> None:
        self._vm.set_gsi_routing([*self._chips, *msi.values()])
        self._msi = msi

    def add(self, address: int, data: int) -> int:
        """Route a new GSI to a message; returns the GSI. Raises ``OSError`` if KVM refuses or none is left."""
        with self._lock:
            gsi = next((n for n in range(IOAPIC_PINS, self._limit) if n not in self._msi), None)
            if gsi is None:
                raise OSError(errno.ENOSPC, f"KVM_SET_GSI_ROUTING: all {self._limit} GSIs of this VM are in use")
            self._set({**self._msi, gsi: MsiRoute(gsi, address, data)})
            return gsi

    def remove(self, gsi: int) -> None:
        with self._lock:
            self._set({n: route for n, route in self._msi.items() if n != gsi})
