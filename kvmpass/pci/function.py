"""What a PCI function is, and what it is made of: whoever adds one implements these.

A ``PciFunction`` is made by a factory from its ``Wiring``. It has a ``ConfigSpace``; its BARs, each a ``Bar`` over a
``BarSource``, in a ``Bars``; ``Intx``, ``Msi`` and ``Msix`` over an ``InterruptSink`` each. A write of configuration
space goes to ``Bars.write``, or into the space; after it ``Bars.decode`` is told the command register, and ``update``
of MSI and MSI-X called. The function writes the header and links its capabilities; it looks at the command register
itself before it does DMA or interrupts. ``Bars`` raises ``OSError`` where KVM keeps a memslot: the function logs it,
and shows the guest the registers as they are.

``AssignedFunction`` is one over a VFIO device. ``Machine.add_function`` plugs any other: a function that ships is a
module of this package, one for tests is like ``tests/support/emulated_edu.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class PciFunction(Protocol):
    """One function on the guest's bus. Nothing raises for what a guest does.

    Synchronization: called with the bus lock held.
    """

    def config_read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of the 4096 of configuration space, inside one aligned dword."""

    def config_write(self, offset: int, data: bytes) -> None:
        """``data`` is 1 to 4 bytes long, inside one aligned dword."""

    def set_multifunction(self, several: bool) -> None:
        """Of function 0: whether its slot holds other functions (header type, bit 7)."""

    def close(self) -> None:
        """Interrupts off, then BARs out of the guest and unmapped. Runs every step even if one fails; idempotent.

        Raises ``OSError``: what failed stays as it is, and ``close`` can be called again.
        """


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


class InterruptSink(Protocol):
    """What raises a function's MSI or MSI-X vectors: it is told which eventfd to signal for each.

    Synchronization: called with the bus lock held; eventfds may be signalled from anywhere, until they are replaced
    or ``disable_irqs`` has returned.
    """

    @property
    def name(self) -> str:
        """For the log."""

    @property
    def count(self) -> int:
        """How many vectors there are."""

    @property
    def resizable(self) -> bool:
        """Whether ``set_irqs`` can add vectors to those that are on; else all are turned off and on again."""

    def set_irqs(self, start: int, eventfds: Sequence[int]) -> None:
        """Signal ``eventfds`` for the vectors from ``start`` on; -1: for none. The first call turns them on.

        Raises ``OSError`` (``ENOSPC``: fewer may be possible); then everything is as before.
        """

    def disable_irqs(self) -> None:
        """Turn them off: no eventfd is signalled any more. Harmless where they are. Raises ``OSError``."""


class PinSink(InterruptSink, Protocol):
    """What drives INTx: one vector, of a line that stays masked from when it is signalled until it is unmasked."""

    def set_unmask_eventfd(self, eventfd: int) -> None:
        """Unmask the line whenever ``eventfd`` is signalled. Raises ``OSError``."""
