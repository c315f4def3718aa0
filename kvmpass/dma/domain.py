"""The VM's one DMA domain: what virt/kvm/iommu.c was in the kernel, over VFIO's type 1 container.

Guest memory is mirrored into the AMD IOMMU at the guest's own physical addresses, once for all devices of the VM.
With type 1 an IOMMU exists only while a group is in the container: the domain is inactive before the first
``attach`` and after the last ``detach``, and maps everything again when a device comes back.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvmpass._teardown import run_all
from kvmpass.errors import AuditFailed, DeviceInUse, NotAssignable, ReservedRange
from kvmpass.layout import Range, Reserved, find_reserved
from kvmpass.memory import GuestMemory, MemoryRegion, RegionKind
from kvmpass.memory.audit import Mirrored, compare
from kvmpass.vfio import Container, Device, Group

log = logging.getLogger(__name__)


class KvmVfio(Protocol):
    """KVM's register of VFIO files (``kvmpass.kvm.VfioDevice``)."""

    def file_add(self, fd: int) -> None: ...

    def file_del(self, fd: int) -> None: ...


@dataclass(frozen=True, slots=True)
class DmaMapping:
    """What the IOMMU acknowledged: I/O virtual address, size and host address in bytes."""

    iova: int
    size: int
    hva: int
    writable: bool


@dataclass(frozen=True, slots=True)
class DmaCall:
    """One acknowledged call: ``operation`` is ``map`` or ``unmap``."""

    operation: str
    range: Range


@dataclass(slots=True)
class _Joined:
    """A group in the container, and its devices that are open."""

    group: Group
    devices: list[Device] = field(default_factory=list)


class Domain:
    """One translation for all of the VM's devices. A listener of ``GuestMemory``.

    Synchronization: regions come and go from any thread (the memory's lock); ``attach``, ``detach``, ``hot_reset``,
    ``use_kvm`` and ``close`` from one thread at a time (``Machine`` holds its lock of moves).
    """

    def __init__(
        self, memory: GuestMemory, kvm_vfio: KvmVfio | None = None, reserved: Iterable[Reserved] = ()
    ) -> None:
        self._memory = memory
        self._kvm_vfio = kvm_vfio
        self._reserved = tuple(reserved)
        self._container: Container | None = None
        self._groups: dict[int, _Joined] = {}
        self._ledger: dict[MemoryRegion, DmaMapping] = {}
        self.calls: deque[DmaCall] = deque(maxlen=65536)
        memory.listen(self)

    @property
    def active(self) -> bool:
        """Whether a group is in the container, so that mappings can exist."""
        return bool(self._groups)

    @property
    def ledger(self) -> list[DmaMapping]:
        """The mappings that the kernel acknowledged and that were not undone, by address."""
        return sorted(self._ledger.values(), key=lambda mapping: mapping.iova)

    @property
    def groups(self) -> list[int]:
        return sorted(self._groups)

    # --- devices

    def attach(self, name: str, group_number: int, vf_token: uuid.UUID | None = None) -> Device:
        """Put the device called ``name`` (its PCI address; bound to vfio-pci) into the domain and open it.

        ``vf_token``: see ``Group.get_device_fd``.
        The first device maps all memory. Raises ``OSError``, ``GroupNotViable``, ``ReservedRange``; then nothing
        has changed.
        """
        with ExitStack() as undo:
            if group_number not in self._groups:
                with self._memory.lock:  # a region that comes meanwhile must not be forgotten
                    self._join(group_number)
                undo.callback(self._leave, group_number)
            joined = self._groups[group_number]
            if any(device.name == name for device in joined.devices):
                raise DeviceInUse(f"{name} is in this domain already")
            device = joined.group.get_device_fd(name, vf_token)
            joined.devices.append(device)
            undo.pop_all()
        return device

    def detach(self, device: Device) -> None:
        """Close ``device``; its group leaves with its last device, all mappings with the last group.

        Runs every step even if one fails. A group that cannot leave stays recorded, with its mappings.
        """
        number = next((n for n, joined in self._groups.items() if device in joined.devices), None)
        if number is None:
            return
        devices = self._groups[number].devices
        steps: list[Callable[[], object]] = [device.close, partial(devices.remove, device)]
        if len(devices) == 1:
            steps.append(partial(self._leave, number))
        run_all(steps)

    def _join(self, number: int) -> None:
        with ExitStack() as undo:
            group = Group(number)
            undo.callback(group.close)
            if self._container is None:
                self._container = Container()
                undo.callback(self._close_container)
            group.set_container(self._container)
            undo.callback(group.unset_container)
            first = not self._groups
            if first:
                self._container.set_iommu()
            for region in self._dma_regions():
                self._check_range(region.range, region.name)
            if first:
                undo.callback(self._unmap_all)
                self.map_all()
            if self._kvm_vfio:
                undo.callback(self._forget, self._kvm_vfio, group)
                self._kvm_vfio.file_add(group.fd)
            self._groups[number] = _Joined(group)
            undo.pop_all()

    @staticmethod
    def _forget(kvm_vfio: KvmVfio, group: Group) -> None:
        """Let KVM drop the group, whether it has got it or not."""
        with suppress(FileNotFoundError):
            kvm_vfio.file_del(group.fd)

    def _leave(self, number: int) -> None:
        group, last = self._groups[number].group, len(self._groups) == 1

        def leave_container() -> None:
            self._unless_taken(group, group.unset_container)
            del self._groups[number]
            if last:
                self._ledger.clear()  # gone with the last group, whatever happened before
            run_all((group.close, *([self._close_container] if last else [])))

        steps: list[Callable[[], None]] = [leave_container]
        if last:
            steps.insert(0, partial(self._unless_taken, group, self._unmap_all))
        if self._kvm_vfio:
            steps.insert(0, partial(self._forget, self._kvm_vfio, group))
        with self._memory.lock:
            run_all(steps)

    @staticmethod
    def _unless_taken(group: Group, step: Callable[[], None]) -> None:
        """Do ``step``; it may fail where the host has taken the group, and all mappings with it.

        It does when somebody unbinds the device and waited for us to close it (vfio_device_remove_group).
        """
        try:
            step()
        except (OSError, AuditFailed):
            if not group.taken:
                raise

    def _close_container(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def hot_reset(self, device: Device) -> None:
        """Reset the slot or bus of ``device``, if all that it resets is in this domain.

        Raises ``NotAssignable`` if not, ``OSError`` (``ENODEV``) where there is no such reset.
        """
        ours = {one.name for joined in self._groups.values() for one in joined.devices}
        dependent = device.get_pci_hot_reset_info()
        others = [one.name for one in dependent if one.name not in ours]
        if others:
            raise NotAssignable(f"a reset of {device.name}'s bus would reset {', '.join(others)} too")
        numbers = {one.group for one in dependent}  # more groups than it has devices are refused
        device.pci_hot_reset([joined.group for number, joined in self._groups.items() if number in numbers])

    def use_kvm(self, kvm_vfio: KvmVfio | None) -> None:
        """From now on another VM, or none, runs over these devices. The old one drops the groups before it gets them.

        The other way round VFIO would take the group from whoever has it (kvm_vfio_file_del, virt/kvm/vfio.c).
        """
        former, self._kvm_vfio = self._kvm_vfio, kvm_vfio
        for joined in self._groups.values():
            if former:
                self._forget(former, joined.group)
            if kvm_vfio:
                kvm_vfio.file_add(joined.group.fd)

    def close(self) -> None:
        """Detach every device. Runs every step even if one fails; idempotent."""
        devices = [device for joined in self._groups.values() for device in joined.devices]
        run_all(partial(self.detach, device) for device in devices)
        run_all(partial(self._leave, number) for number in list(self._groups))  # what could not leave before

    # --- memory

    def _dma_regions(self) -> list[MemoryRegion]:
        return [region for region in self._memory if region.dma]

    def _check_range(self, range_: Range, name: str) -> None:
        """Refuse what this host cannot translate: by its list, and by what the container says while there is one.

        The container knows more (it can shrink with each group that joins), the list knows names.
        """
        line = find_reserved(range_, self._reserved)
        if line:
            raise ReservedRange(
                f"{name} {range_} falls into this host's reserved range {line}",
                "put it elsewhere: cat /sys/kernel/iommu_groups/*/reserved_regions lists what devices cannot reach",
            )
        usable = self._container.get_info().ranges if self._container else ()
        if usable and not any(one.contains(range_) for one in usable):
            raise ReservedRange(f"{name} {range_} falls into addresses that the IOMMU of this host cannot translate")

    def map_all(self) -> None:
        """Walk all regions and map each (``kvm_iommu_map_memslots``). All or nothing."""
        with ExitStack() as undo:
            for region in self._dma_regions():
                self.map_region(region)
                undo.callback(self.unmap_region, region)
            undo.pop_all()

    def map_region(self, region: MemoryRegion) -> None:
        """Map one region, by one call, at its guest-physical address (``kvm_iommu_map_pages``); ROM is read-only."""
        assert self._container is not None
        mapping = DmaMapping(region.gpa, region.size, region.hva, region.kind.dma_writable)
        self._ledger[region] = mapping
        try:
            self._container.map_dma(mapping.iova, mapping.hva, mapping.size, writable=mapping.writable)
        except OverflowError:  # no number that the kernel could have been asked for
            del self._ledger[region]
            raise
        except BaseException as error:  # an interrupt may come after the call
            run_all((partial(self._unmap_doubtful, region),), error)
            raise
        self.calls.append(DmaCall("map", Range(mapping.iova, mapping.size)))
        log.info("map %s -> iova %#x, %s", region, mapping.iova, "rw" if mapping.writable else "ro")

    def _unmap_doubtful(self, region: MemoryRegion) -> None:
        """What is not mapped is no error here. If this fails the region stays in the ledger, its memory mapped."""
        assert self._container is not None
        self._container.unmap_dma(region.gpa, region.size)
        del self._ledger[region]

    def unmap_region(self, region: MemoryRegion) -> None:
        """Undo ``map_region``. Raises ``AuditFailed`` if the kernel had not mapped what the ledger says."""
        assert self._container is not None
        mapping = self._ledger[region]
        unmapped = self._container.unmap_dma(mapping.iova, mapping.size)
        del self._ledger[region]
        self.calls.append(DmaCall("unmap", Range(mapping.iova, mapping.size)))
        if unmapped != mapping.size:
            raise AuditFailed(
                f"{region.name}: {unmapped:#x} bytes were mapped at {mapping.iova:#x}, "
                f"the ledger has {mapping.size:#x}"
            )

    def _unmap_all(self) -> None:
        """Undo every mapping, then let the kernel say whether there were more. Raises ``AuditFailed``."""
        assert self._container is not None
        run_all((*(partial(self.unmap_region, region) for region in list(self._ledger)), self._check_none_left))

    def _check_none_left(self) -> None:
        assert self._container is not None
        if left := self._container.unmap_all():
            raise AuditFailed(f"{left:#x} bytes were mapped that the ledger does not have")

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """Listener: refused before anything is mapped, even while the domain is inactive."""
        if kind is not RegionKind.BAR:
            self._check_range(range_, name)

    def region_added(self, region: MemoryRegion) -> None:
        """Listener: a region of an active domain is mapped before anyone can use it."""
        if self.active and region.dma:
            self.map_region(region)

    def region_removed(self, region: MemoryRegion) -> None:
        if region in self._ledger:
            self.unmap_region(region)

    def holds(self, region: MemoryRegion) -> bool:
        """Listener: whether devices may still reach the region's memory."""
        return region in self._ledger

    # --- the invariant

    def audit(self) -> None:
        """RAM regions are exactly the writable mappings, ROM exactly the read-only ones, at their own address.

        Raises ``AuditFailed`` naming every difference. Nothing is mapped while the domain is inactive.
        """
        regions = self._dma_regions() if self.active else ()
        wanted = {Mirrored(region.range, region.hva, region.kind.dma_writable) for region in regions}
        compare("DMA mappings", wanted, {Mirrored(Range(m.iova, m.size), m.hva, m.writable) for m in self.ledger})
