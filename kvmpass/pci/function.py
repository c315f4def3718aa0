"""What a PCI function is made of: implement these, and ``Bar``, ``Intx``, ``Msi`` and ``Msix`` do the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvmpass.bus import Bus
from kvmpass.kvm import IrqRoutes, Vm
from kvmpass.layout import Range
from kvmpass.memory import GuestMemory, HostMapping
from kvmpass.pci.space import BarSpace


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a function is connected to: the VM's interrupts, its memory, its buses. ``gsis``: of INTA to INTD."""

    vm: Vm
    routes: IrqRoutes
    memory: GuestMemory
    ports: Bus
    mmio: Bus
    bars: BarSpace
    gsis: tuple[int, ...]


class BarSource(Protocol):
    """What is behind a BAR: registers, memory, or both. ``vfio.Region`` is one.

    Synchronization: called with the bus lock held.
    """

    @property
    def size(self) -> int:
        """Bytes. The BAR has the next power of two; what lies behind the end reads as ones."""

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        """The parts that the guest may reach without an exit, relative to the BAR; only whole pages of them count."""

    def mmap(self, area: Range) -> HostMapping:
        """Pages that show ``area``, a part of ``mmap_areas``; the BAR closes the mapping. Raises ``OSError``."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes; all of the access is inside. ``OSError``: the guest reads ones."""

    def write(self, offset: int, data: bytes) -> None:
        """``data`` is 1, 2, 4 or 8 bytes long, all of it inside. ``OSError``: the write is lost."""
