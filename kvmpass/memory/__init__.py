"""Guest memory: one list of regions, from which KVM memslots and DMA mappings are derived."""

from kvmpass.memory.machinememory import MachineMemory
from kvmpass.memory.mapping import HUGE, Backing, HostMapping, StopFlag
from kvmpass.memory.plan import MemoryPlan, PlannedRegion, plan_memory
from kvmpass.memory.regions import GuestMemory, MemoryRegion, RegionKind, RegionListener

__all__ = [
    "HUGE",
    "Backing",
    "GuestMemory",
    "HostMapping",
    "MachineMemory",
    "MemoryPlan",
    "MemoryRegion",
    "PlannedRegion",
    "RegionKind",
    "RegionListener",
    "StopFlag",
    "plan_memory",
]
