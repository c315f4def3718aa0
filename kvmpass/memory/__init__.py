"""Guest memory: one list of regions, from which KVM memslots and DMA mappings are derived."""

from kvmpass.memory.mapping import HUGE, Backing, HostMapping
from kvmpass.memory.plan import MemoryPlan, PlannedRegion, plan_memory
from kvmpass.memory.regions import GuestMemory, MemoryRegion, RegionKind, RegionListener

__all__ = [
    "HUGE",
    "Backing",
    "GuestMemory",
    "HostMapping",
    "MemoryPlan",
    "MemoryRegion",
    "PlannedRegion",
    "RegionKind",
    "RegionListener",
    "plan_memory",
]
