"""What a guest will see of a device, its interrupts and BARs, as the host's sysfs shows them before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvmpass import pciregs
from kvmpass._dataclass import dataclass
from kvmpass.layout import PAGE, Range
from kvmpass.pci.bar import mappable
from kvmpass.pci.barspace import BarKind, BarSpace

ROM_INDEX = pciregs.BARS
"""The expansion ROM's number, after the BARs."""
_IO, _MEMORY, _MEMORY64 = 0x100, 0x200, 0x100000  # IORESOURCE_… (include/linux/ioport.h)


@dataclass(frozen=True, slots=True)
class Vectors:
    """The interrupts of a device; None where configuration space is unreadable."""

    msix: int | None
    """Number of MSI-X vectors."""
    msi: int | None
    """Number of MSI vectors."""
    intx: bool | None
    """Whether it has an interrupt pin."""
    trapped: tuple[tuple[int, Range], ...] = ()
    """The MSI-X table and its pending bits, which are emulated, with the index of their BAR."""


@dataclass(frozen=True, slots=True)
class BarPreview:
    """A BAR, or the expansion ROM."""

    index: int
    """0 to 5: a BAR; 6: the expansion ROM."""
    kind: BarKind
    """What it decodes."""
    size: int
    """Bytes."""
    mapped: tuple[Range, ...] | None
    """The parts that become memslots; None where the place of the MSI-X table is unknown."""

    @property
    def name(self) -> str:
        """``bar0`` to ``bar5``, ``rom``."""
        return "rom" if self.index == ROM_INDEX else f"bar{self.index}"


def preview_vectors(space: bytes) -> Vectors:
    """Read them from the first 256 bytes of configuration space, of which non-root users can read 64."""
    if len(space) < pciregs.CONVENTIONAL_SIZE:
        return Vectors(None, None, bool(space[pciregs.INTERRUPT_PIN]) if len(space) >= pciregs.HEADER_SIZE else None)

    def read(offset: int, size: int) -> int:
        return int.from_bytes(space[offset : offset + size], "little")

    found = {capability.id: capability.offset for capability in reversed(pciregs.capabilities(read))}
    msi = msix = 0
    trapped: list[tuple[int, Range]] = []
    if at := found.get(pciregs.CAP_MSI):
        msi = pciregs.msi(read, at).vectors
    if at := found.get(pciregs.CAP_MSIX):
        own = pciregs.msix(read, at)
        msix = own.vectors
        trapped.append((own.table_bar, Range(own.table_offset, own.table_size)))
        trapped.append((own.pba_bar, Range(own.pba_offset, own.pba_size)))
    return Vectors(msix, msi, bool(space[pciregs.INTERRUPT_PIN]), tuple(trapped))


def preview_bars(resources: Iterable[tuple[int, int]], vectors: Vectors) -> tuple[BarPreview, ...]:
    """Read them from size and flags of each line of ``resource`` in sysfs: BARs, then the ROM."""
    bars = []
    for index, (size, flags) in enumerate(resources):
        if index > ROM_INDEX or not size or not flags & (_IO | _MEMORY):
            continue
        kind = BarKind.IO if flags & _IO else BarKind.MEMORY64 if flags & _MEMORY64 else BarKind.MEMORY32
        traps = [range_ for bar, range_ in vectors.trapped if bar == index]
        # VFIO maps no ports, no ROM, and no BAR that shares its page with others.
        whole = [Range(0, size)] if flags & _MEMORY and index != ROM_INDEX and size >= PAGE else []
        known = vectors.msix is not None or not whole
        bars.append(BarPreview(index, kind, size, tuple(mappable(whole, traps)) if known else None))
    return tuple(bars)


def allocate(space: BarSpace, bars: Sequence[BarPreview]) -> None:
    """Allocate addresses as an assigned function does. Raises ``LayoutError`` where a window is full."""
    for bar in bars:
        space.allocate(bar.kind, 1 << (bar.size - 1).bit_length())
