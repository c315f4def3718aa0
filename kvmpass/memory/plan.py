"""Which regions a machine's memory is made of, before there is any memory: for machines, and for who only asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmpass.layout import Layout, Range, Reserved, plan_layout
from kvmpass.memory.mapping import Backing
from kvmpass.memory.regions import RegionKind


@dataclass(frozen=True, slots=True)
class PlannedRegion:
    """What ``MemoryRegion`` is going to be: guest-physical addresses, which are also the devices'."""

    kind: RegionKind
    range: Range
    name: str
    backing: Backing


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A machine's layout, and its regions by address."""

    layout: Layout
    regions: tuple[PlannedRegion, ...]

    @property
    def mapped(self) -> tuple[PlannedRegion, ...]:
        """Those that devices reach: one map call each when the first device comes."""
        return tuple(region for region in self.regions if region.kind.dma)

    @property
    def locked(self) -> int:
        """Bytes that mapping locks in memory."""
        return sum(region.range.size for region in self.mapped)


def plan_memory(
    size: int, reserved: Iterable[Reserved] = (), phys_bits: int = 40, backing: Backing = Backing.ANONYMOUS
) -> MemoryPlan:
    """The layout and the regions of a machine with ``size`` bytes of RAM. Raises as ``plan_layout`` does."""
    layout = plan_layout(size, reserved, phys_bits, backing.page_size)
    ram = (PlannedRegion(RegionKind.RAM, part, f"ram{n}", backing) for n, part in enumerate(layout.ram))
    return MemoryPlan(layout, tuple(ram))
