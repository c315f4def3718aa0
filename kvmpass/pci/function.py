"""The interfaces of a PCI function and its parts, which a new kind of function implements.

A factory constructs a ``PciFunction`` from its ``Wiring``. It has a ``ConfigSpace``; its BARs, each a ``Bar`` over a
``BarSource``, in a ``Bars``; ``Intx``, ``Msi`` and ``Msix`` over an ``InterruptSink`` each. A write of configuration
space goes to ``Bars.write`` or into the space; then ``Bars.decode`` receives the command register, and ``update`` of
MSI and MSI-X is called. The function writes the header and links its capabilities; it checks the command register
itself before DMA and interrupts. ``Bars`` raises ``OSError`` where KVM keeps a memslot: the function logs it, and the
guest reads the registers as they are.

``AssignedFunction`` is one over a VFIO device. ``Machine.add_function`` plugs any other: a function of the product is
a module of this package, one for tests is like ``tests/support/emulated_edu.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvmpass._dataclass import dataclass
from kvmpass.bus import Bus
from kvmpass.kvm import Fastpath, FastRegisters, IrqRoutes, Vm
from kvmpass.layout import Range
from kvmpass.memory import GuestMemory, HostMapping
from kvmpass.pci.barspace import BarSpace


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a function is connected to: the VM's interrupts, its memory, its buses."""

    vm: Vm
    """The VM, for irqfds."""
    routes: IrqRoutes
    """Its routes, for message-signalled interrupts."""
    memory: GuestMemory
    """The guest's memory, for memslots and DMA."""
    ports: Bus
    """The bus of I/O ports."""
    mmio: Bus
    """The bus of guest-physical addresses without a memslot."""
    bars: BarSpace
    """The address windows for BARs."""
    gsis: tuple[int, ...]
    """The GSIs of INTA to INTD."""
    place: str = ""
    """Device and function number, such as ``01.0``."""
    fastpath: Fastpath | None = None
    """What vCPUs access without Python."""


class PciFunction(Protocol):
    """One function on the guest's bus. Nothing raises for what a guest does.

    Synchronization: with the bus lock held.
    """

    def config_read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes of the 4096 of configuration space, inside one aligned dword."""

    def config_write(self, offset: int, data: bytes) -> None:
        """Write ``data``, 1 to 4 bytes inside one aligned dword."""

    def config_image(self) -> bytes | FastRegisters | None:
        """Return all 4096 bytes as ``config_read`` does, if they change by writes of the guest only.

        The guest may then read them without an exit. Or the registers for the fast path, always the same object, if
        ``config_read`` returns what they say; they are not read any more once the function is off its bus. None where
        neither holds, or a read has an effect.
        """

    def set_multifunction(self, several: bool) -> None:
        """Set whether the slot of this function 0 has other functions (header type, bit 7)."""

    def close(self) -> None:
        """Disable the interrupts, remove the BARs from the guest and unmap them. Runs every step even if one fails.

        Raises ``OSError``: what failed stays as it is, and ``close`` can be called again. Idempotent.
        """


class BarSource(Protocol):
    """The registers or memory behind a BAR, such as ``vfio.Region``.

    Synchronization: with the bus lock held.
    """

    @property
    def size(self) -> int:
        """Bytes. The BAR's size is the next power of two; beyond the end it reads as ones."""

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        """The parts that the guest may access without an exit, relative to the BAR. Only whole pages count."""

    def mmap(self, area: Range) -> HostMapping:
        """Map ``area``, a part of ``mmap_areas``; the BAR closes the mapping. Raises ``OSError``."""

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes; all of the access is inside. After ``OSError`` the guest reads ones."""

    def write(self, offset: int, data: bytes) -> None:
        """Write 1, 2, 4 or 8 bytes, all of them inside. After ``OSError`` the write is lost."""


class InterruptSink(Protocol):
    """The source of MSI or MSI-X interrupts, such as ``vfio.Irqs``: signals an eventfd for each vector.

    Synchronization: with the bus lock held; eventfds may be signalled from any thread, until they are replaced or
    ``disable_irqs`` has returned.
    """

    @property
    def name(self) -> str:
        """The device, for the log."""

    @property
    def count(self) -> int:
        """Number of vectors."""

    @property
    def resizable(self) -> bool:
        """Whether ``set_irqs`` can add vectors while others are enabled; otherwise all are disabled first."""

    def set_irqs(self, start: int, eventfds: Sequence[int]) -> None:
        """Signal ``eventfds`` for the vectors from ``start`` on, -1: none. The first call enables them.

        Raises ``OSError`` (``ENOSPC``: fewer may be possible); then nothing has changed.
        """

    def disable_irqs(self) -> None:
        """Disable all vectors: no eventfd is signalled after this. Idempotent. Raises ``OSError``."""


class PinSink(InterruptSink, Protocol):
    """The source of INTx: one vector, which masks itself when it is signalled."""

    def set_unmask_eventfd(self, eventfd: int) -> None:
        """Unmask the vector whenever ``eventfd`` is signalled. Raises ``OSError``."""
