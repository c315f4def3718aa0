"""The VM's table of GSI routes, which KVM replaces only as a whole (``KVM_SET_GSI_ROUTING``)."""

from __future__ import annotations

import errno
import threading

from kvmpass._native import ffi, lib
from kvmpass.kvm.types import Capability
from kvmpass.kvm.vm import MsiRoute, Vm
from kvmpass.ports import IOAPIC_PINS


class IrqRoutes:
    """The IOAPIC's pins, and GSIs above them for message-signalled interrupts. No route leads to the PIC.

    A change takes effect at once; one that KVM refuses leaves the table unchanged. The table is kept as KVM reads it:
    a change costs one entry and one call, however many routes there are.

    Synchronization: from any thread.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._limit = vm.check_extension(Capability.IRQ_ROUTING)
        self._table = ffi.new("struct kvmpass_route[]", self._limit)
        self._index: dict[int, int] = {}  # where a message's GSI is in the table
        self._free = list(range(self._limit - 1, IOAPIC_PINS - 1, -1))  # the lowest is last
        self._lock = threading.Lock()
        for pin in range(IOAPIC_PINS):
            entry = self._table[pin]
            entry.gsi, entry.type = pin, lib.KVM_IRQ_ROUTING_IRQCHIP
            entry.irqchip, entry.pin = lib.KVM_IRQCHIP_IOAPIC, pin
        self._count = IOAPIC_PINS
        self._vm.set_gsi_routing(self._table, self._count)

    def __repr__(self) -> str:
        return f"<IrqRoutes {IOAPIC_PINS} pins, {len(self._index)} messages, {len(self._free)} GSIs free>"

    @property
    def msi(self) -> list[MsiRoute]:
        """The routes of message-signalled interrupts, by GSI."""
        with self._lock:
            entries = [self._table[at] for at in self._index.values()]
            return sorted(
                (MsiRoute(entry.gsi, entry.address, entry.data) for entry in entries), key=lambda route: route.gsi
            )

    def add(self, address: int, data: int) -> int:
        """Route a new GSI to a message (``address``: 64 bits, ``data``: 32 bits). Return the GSI.

        Raises ``OSError`` if KVM refuses or no GSI is free (``ENOSPC``), ``OverflowError`` for a larger number.
        """
        with self._lock:
            if not self._free or self._count == self._limit:
                raise OSError(errno.ENOSPC, f"KVM_SET_GSI_ROUTING: all {self._limit} GSIs of this VM are in use")
            gsi = self._free[-1]
            entry = self._table[self._count]
            entry.gsi, entry.type, entry.address, entry.data = gsi, lib.KVM_IRQ_ROUTING_MSI, address, data
            self._vm.set_gsi_routing(self._table, self._count + 1)
            self._free.pop()
            self._index[gsi] = self._count
            self._count += 1
            return gsi

    def remove(self, gsi: int) -> None:
        """Remove a route; the table's last entry replaces it. A closed VM is not called.

        Raises ``OSError`` if KVM refuses, ``KeyError`` for a GSI without a route.
        """
        with self._lock:
            at, last = self._index[gsi], self._count - 1
            removed = ffi.new("struct kvmpass_route *", self._table[at])
            self._table[at] = self._table[last]
            try:
                if not self._vm.closed:
                    self._vm.set_gsi_routing(self._table, last)
            except OSError:
                self._table[at] = removed[0]
                raise
            self._index[self._table[at].gsi] = at
            del self._index[gsi]
            self._count = last
            self._free.append(gsi)
