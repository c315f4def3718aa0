"""The list of regions as KVM memslots."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass

from kvmpass.kvm.vm import Vm
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion, RegionKind


@dataclass(frozen=True, slots=True)
class Memslot:
    """What KVM acknowledged: guest-physical address, size and host address in bytes."""

    slot: int
    gpa: int
    size: int
    hva: int
    readonly: bool


class Memslots:
    """A listener of ``GuestMemory``: one slot for each region. ``ledger`` holds the acknowledged calls' effect."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[MemoryRegion, Memslot] = {}

    @property
    def ledger(self) -> list[Memslot]:
        return sorted(self._slots.values(), key=lambda slot: slot.gpa)

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """KVM takes every range that the list takes."""

    def region_added(self, region: MemoryRegion) -> None:
        used = {slot.slot for slot in self._slots.values()}
        number = next(n for n in range(len(used) + 1) if n not in used)
        slot = Memslot(number, region.gpa, region.size, region.hva, not region.guest_writable)
        self._slots[region] = slot
        try:
            self._vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, readonly=slot.readonly)
        except BaseException:
            # However far it got (an interrupt may come after the call), no slot stays; deleting none is EINVAL.
            with suppress(OSError):
                self._vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)
            del self._slots[region]
            raise

    def region_removed(self, region: MemoryRegion) -> None:
        slot = self._slots[region]
        self._vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)
        del self._slots[region]

    def move(self, vm: Vm) -> None:
        """Show the same regions to another VM, which takes the old one's place. Raises ``OSError``: nothing moved."""
        for slot in self._slots.values():
            vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, readonly=slot.readonly)
        self._vm = vm

    def close(self) -> None:
        """Delete every slot: before the memory behind them goes. Every one is tried."""
        with ExitStack() as steps:
            for region in list(self._slots):
                steps.callback(self.region_removed, region)
