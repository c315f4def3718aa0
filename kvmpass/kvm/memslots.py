"""The list of regions as KVM memslots."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import partial

from kvmpass._teardown import run_all
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
    """A listener of ``GuestMemory``: one slot for each region. ``ledger`` holds the acknowledged calls' effect.

    A VM that is closed has no slots any more: nothing is asked of it. Synchronization: called with the memory's lock
    held, ``move`` and ``close`` while nothing changes the memory.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[MemoryRegion, Memslot] = {}
        self._doubtful: set[MemoryRegion] = set()  # of which KVM may have no slot

    @property
    def ledger(self) -> list[Memslot]:
        """The slots that KVM acknowledged and that were not deleted, by address."""
        return sorted(self._slots.values(), key=lambda slot: slot.gpa)

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """KVM takes every range that the list takes."""

    def region_added(self, region: MemoryRegion) -> None:
        """Listener. Raises ``OSError`` if KVM refuses."""
        used = {slot.slot for slot in self._slots.values()}
        number = next(n for n in range(len(used) + 1) if n not in used)
        slot = Memslot(number, region.gpa, region.size, region.hva, not region.guest_writable)
        self._slots[region] = slot
        try:
            self._create(self._vm, slot)
        except OverflowError:  # no number that KVM could have been asked for
            del self._slots[region]
            raise
        except BaseException as error:  # an interrupt may come after the call
            self._doubtful.add(region)
            run_all((partial(self.region_removed, region),), error)
            raise

    def region_removed(self, region: MemoryRegion) -> None:
        """Listener. Raises ``OSError`` if KVM keeps the slot: it stays in the ledger."""
        try:
            self._delete(self._vm, self._slots[region])
        except OSError as error:
            if region not in self._doubtful or error.errno != errno.EINVAL:  # that one says that there is none
                raise
        self._doubtful.discard(region)
        del self._slots[region]

    def holds(self, region: MemoryRegion) -> bool:
        """Listener: whether the guest may still reach the region's memory."""
        return region in self._slots and not self._vm.closed

    @staticmethod
    def _create(vm: Vm, slot: Memslot) -> None:
        vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, readonly=slot.readonly)

    @staticmethod
    def _delete(vm: Vm, slot: Memslot) -> None:
        if not vm.closed:
            vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)

    def move(self, vm: Vm) -> None:
        """Show the same regions to another VM, which takes the old one's place. Raises ``OSError``: nothing moved."""
        for slot in self._slots.values():
            self._create(vm, slot)
        self._vm = vm

    def leave(self, vm: Vm) -> None:
        """Delete every slot of a VM that ``move`` has left and that nobody runs: KVM keeps its page tables else.

        An assigned device keeps the VM that it was opened for until it is closed. Runs every step even if one fails.
        """
        run_all(partial(self._delete, vm, slot) for slot in self._slots.values())

    def close(self) -> None:
        """Delete every slot: before the memory behind them goes. Runs every step even if one fails."""
        run_all(partial(self.region_removed, region) for region in list(self._slots))
