"""The list of regions as KVM memslots."""

from __future__ import annotations

import errno
from functools import partial

from kvmpass._dataclass import dataclass
from kvmpass._teardown import run_all
from kvmpass.kvm.vm import Vm
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion, RegionKind


@dataclass(frozen=True, slots=True)
class Memslot:
    """A memslot that KVM acknowledged."""

    slot: int
    """Its number."""
    gpa: int
    """Guest-physical address."""
    size: int
    """Bytes."""
    hva: int
    """Address in this process."""
    readonly: bool
    """Whether a write of the guest exits instead."""


class Memslots:
    """A listener of ``GuestMemory``: one slot for each region.

    A closed VM has no slots: it is not called again.

    Synchronization: with the memory's lock held; ``move``, ``leave`` and ``close`` while nothing changes the memory.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[MemoryRegion, Memslot] = {}
        self._doubtful: set[MemoryRegion] = set()  # KVM may have no slot for them

    @property
    def ledger(self) -> list[Memslot]:
        """The current slots, as KVM acknowledged them, by address."""
        return sorted(self._slots.values(), key=lambda slot: slot.gpa)

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """Accept any range; KVM refuses none that the list accepts."""

    def region_added(self, region: MemoryRegion) -> None:
        """Create a slot. Raises ``OSError`` if KVM refuses."""
        used = {slot.slot for slot in self._slots.values()}
        number = next(n for n in range(len(used) + 1) if n not in used)
        slot = Memslot(number, region.gpa, region.size, region.hva, not region.kind.guest_writable)
        self._slots[region] = slot
        try:
            self._create(self._vm, slot)
        except OverflowError:  # raised before the ioctl
            del self._slots[region]
            raise
        except BaseException as error:  # KeyboardInterrupt may be raised after the ioctl
            self._doubtful.add(region)
            run_all(partial(self.region_removed, region), failure=error)
            raise

    def region_removed(self, region: MemoryRegion) -> None:
        """Delete the slot. Raises ``OSError`` if KVM keeps it: it stays in the ledger.

        There may be none: of a region that another listener refused, and holds.
        """
        if region not in self._slots:
            return
        try:
            self._delete(self._vm, self._slots[region])
        except OSError as error:
            if region not in self._doubtful or error.errno != errno.EINVAL:  # EINVAL: there is none
                raise
        self._doubtful.discard(region)
        del self._slots[region]

    def holds(self, region: MemoryRegion) -> bool:
        """Return whether the guest may still reach the region's memory."""
        return region in self._slots and not self._vm.closed

    @staticmethod
    def _create(vm: Vm, slot: Memslot) -> None:
        vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, readonly=slot.readonly)

    @staticmethod
    def _delete(vm: Vm, slot: Memslot) -> None:
        if not vm.closed:
            vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)

    def move(self, vm: Vm) -> None:
        """Create the same slots in another VM, which replaces the old one. Raises ``OSError``: nothing changed."""
        for slot in self._slots.values():
            self._create(vm, slot)
        self._vm = vm

    def leave(self, vm: Vm) -> None:
        """Delete the slots of a VM that ``move`` has replaced, so that KVM frees its page tables.

        An assigned device keeps the VM that it was opened for until it is closed. Runs every step even if one fails.
        """
        run_all(*(partial(self._delete, vm, slot) for slot in self._slots.values()))

    def close(self) -> None:
        """Delete every slot, before its memory is unmapped. Runs every step even if one fails."""
        run_all(*(partial(self.region_removed, region) for region in list(self._slots)))
