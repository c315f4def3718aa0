"""Which regions a machine has, before they are allocated: for machines, and for callers that only need numbers."""

from __future__ import annotations

from collections.abc import Iterable

from kvmpass._dataclass import dataclass
from kvmpass.layout import Layout, Range, Reserved, plan_layout
from kvmpass.memory.mapping import Backing
from kvmpass.memory.regions import RegionKind


@dataclass(frozen=True, slots=True)
class PlannedRegion:
    """A ``MemoryRegion`` to be."""

    kind: RegionKind
    """RAM; ROM and BARs are not planned."""
    range: Range
    """Guest-physical addresses, which are the devices' I/O virtual addresses too."""
    name: str
    """Its name in messages."""
    backing: Backing
    """What holds its bytes."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A machine's layout and regions."""

    layout: Layout
    """The guest-physical address space."""
    regions: tuple[PlannedRegion, ...]
    """The regions, by address."""

    @property
    def mapped(self) -> tuple[PlannedRegion, ...]:
        """The regions that devices reach: one map call each when the first device is attached."""
        return tuple(region for region in self.regions if region.kind.dma)

    @property
    def locked(self) -> int:
        """Bytes that mapping locks in memory."""
        return sum(region.range.size for region in self.mapped)

    @property
    def memfds(self) -> int:
        """The number of regions that are memfds."""
        return sum(region.backing.is_memfd for region in self.regions)


def plan_memory(
    size: int, reserved: Iterable[Reserved] = (), phys_bits: int = 40, backing: Backing = Backing.ANONYMOUS
) -> MemoryPlan:
    """Plan the layout and the regions of a machine with ``size`` bytes of RAM. Raises as ``plan_layout`` does."""
    layout = plan_layout(size, reserved, phys_bits, backing.page_size)
    ram = (PlannedRegion(RegionKind.RAM, part, f"ram{n}", backing) for n, part in enumerate(layout.ram))
    return MemoryPlan(layout, tuple(ram))
