"""The VM's one DMA domain over a back end (``kvmpass.dma.backend``): what virt/kvm/iommu.c did in the kernel.

Guest memory is mapped in the IOMMU at the guest's own physical addresses, once for all devices of the VM. Mappings
exist while a device is attached: the first attach maps everything, the last detach unmaps it.

With peer-to-peer the BARs of its devices are mapped, too, where the guest has placed them, while they decode: they
are regions of guest memory for exactly that time. The kernel does not end such a mapping with the device (type 1), or
it does so without notice (iommufd): a device is closed only after its BARs are unmapped.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from kvmpass._dataclass import dataclass, replace
from kvmpass._log import Log
from kvmpass._teardown import run_all, undo_on_error
from kvmpass._together import run_together
from kvmpass.errors import AuditFailed, DeviceInUse, NotAssignable, ReservedRange
from kvmpass.layout import Range, Reserved, find_reserved
from kvmpass.memory import GuestMemory, MemoryRegion, RegionKind
from kvmpass.memory.audit import Mirrored, compare
from kvmpass.vfio import DependentDevice, Device, RegionMapping

if TYPE_CHECKING:
    from kvmpass.dma.backend import BackendFactory, KvmVfio

log = Log(__name__)


@dataclass(frozen=True, slots=True)
class DmaMapping:
    """A mapping that the kernel acknowledged."""

    iova: int
    """I/O virtual address."""
    size: int
    """Bytes."""
    hva: int
    """Address in this process."""
    writable: bool
    """Whether devices may write."""
    device: str | None = None
    """The PCI address of the device whose BAR it is; None: guest memory."""
    bar: int | None = None
    """The number of that BAR."""


class Domain:
    """One translation for all of the VM's devices: a listener of ``GuestMemory``, and the ``Mapper`` of its back end.

    ``backend`` constructs the back end; ``reserved``: the ranges that this host's IOMMU does not translate; ``p2p``:
    whether devices reach the BARs of the domain's other devices (peer-to-peer).

    Synchronization: regions are added and removed from any thread (the memory's lock, which ``map_all`` and
    ``unmap_all`` take too); ``attach``, ``detach``, ``hot_reset``, ``rebind_kvm`` and ``close`` from one thread at a
    time (``Machine`` holds its device lock).
    """

    def __init__(
        self,
        memory: GuestMemory,
        backend: BackendFactory,
        kvm_vfio: KvmVfio | None = None,
        reserved: Iterable[Reserved] = (),
        *,
        p2p: bool = False,
    ) -> None:
        self._memory = memory
        self.p2p = p2p
        """Whether devices reach the BARs of the domain's other devices."""
        self._reserved = tuple(reserved)
        self._devices: list[Device] = []
        self._ledger: dict[MemoryRegion, DmaMapping] = {}
        self._doubtful: set[MemoryRegion] = set()  # the kernel may have no mapping for them
        self._mapped = False  # whether a region that is added is mapped; guarded by the memory's lock
        self._kvm_vfio = kvm_vfio
        self._files: list[int] = []  # that are registered with it
        self.backend = backend(self)
        """What maps memory in the IOMMU."""
        memory.listen(self)

    @property
    def active(self) -> bool:
        """Whether mappings can exist: a device is attached, or one could not be detached."""
        return self.backend.active

    @property
    def ledger(self) -> list[DmaMapping]:
        """The current mappings, as the kernel acknowledged them, by address."""
        return sorted(self._ledger.values(), key=lambda mapping: mapping.iova)

    def use(self, backend: BackendFactory) -> None:
        """Replace the back end. Raises ``DeviceInUse`` while it is active."""
        if self.active:
            raise DeviceInUse("the domain's back end is replaced only while no device is attached")
        self.backend = backend(self)

    # --- devices

    def attach(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Device:
        """Attach the device at PCI address ``name``, which is bound to vfio-pci, and open it.

        ``vf_token``: see ``Group.get_device_fd``. The first device maps all memory.
        Raises ``OSError``, ``DeviceInUse``, ``GroupNotViable``, ``ReservedRange``; then nothing has changed.
        """
        [device] = self.attach_all({name: group}, {name: vf_token} if vf_token else {})
        return device

    def attach_all(self, groups: Mapping[str, int], vf_tokens: Mapping[str, uuid.UUID]) -> list[Device]:
        """Attach several devices, all or none: by their PCI addresses, with their groups; see ``attach``.

        They are opened, and thereby reset, at the same time; those with VF tokens one after the other, in their
        order, since opening a physical function sets the token of its virtual functions. Raises ``ValueError`` for
        the token of another device.
        """
        for name in vf_tokens:
            if name not in groups:
                raise ValueError(f"a VF token of {name}, which is not among the devices")
        for name in groups:
            if any(device.name == name for device in self._devices):
                raise DeviceInUse(f"{name} is in this domain already")
        with self._until_inactive():
            with ExitStack() as stack:
                entered = (self.backend.attaching(name, group, vf_tokens.get(name)) for name, group in groups.items())
                calls = dict(zip(groups, (stack.enter_context(attaching) for attaching in entered), strict=True))
                completing: dict[str, Callable[[], Device]] = {}

                def open_in_order(names: list[str]) -> None:
                    for name in names:
                        completing[name] = calls[name]()

                in_order = [name for name in groups if name in vf_tokens]
                batches = [[name] for name in groups if name not in vf_tokens] + ([in_order] if in_order else [])
                run_together(*(partial(open_in_order, batch) for batch in batches))
                devices = [completing[name]() for name in groups]
            self._devices += devices
        return devices

    def detach(self, device: Device) -> None:
        """Close ``device`` and detach it; the last detach unmaps everything. Idempotent.

        Runs every step even if one fails. If it cannot leave the translation its mappings stay recorded. Raises
        ``DeviceInUse`` if one of its BARs cannot be unmapped: the device then stays open and attached.
        """
        if device in self._devices:
            self._remove_bars(device)
            with self._until_inactive():
                run_all(partial(self.backend.detach, device), partial(self._devices.remove, device))

    def _remove_bars(self, device: Device) -> None:
        """Remove what is left of the device's BARs, because it could not be removed before.

        Other devices may write to these addresses until then, which are those of another device once the host uses
        them again.
        """
        with self._memory.lock:
            left = [region for region in self._ledger if self._device_of(region) is device]
            try:
                run_all(*(partial(self._memory.remove, region) for region in left))
            except (OSError, AuditFailed) as error:
                raise DeviceInUse(
                    f"{device.name} stays open: other devices may still reach its BARs by DMA: {error}",
                    "end this process: the kernel then removes the mappings and closes the device",
                ) from error

    @contextmanager
    def _until_inactive(self) -> Iterator[None]:
        """Clear the ledger once the translation is gone: the kernel has then unmapped everything."""
        try:
            yield
        finally:
            if not self.active:
                with self._memory.lock:
                    self._ledger.clear()
                    self._doubtful.clear()

    def dependent(self, device: Device) -> list[DependentDevice]:
        """Return the devices that ``hot_reset`` resets: all of them are in this domain.

        Raises ``NotAssignable`` if one is not, ``OSError`` (``ENODEV``: neither slot nor bus can be reset).
        """
        attached = {attached.name for attached in self._devices}
        dependent = device.get_pci_hot_reset_info()
        others = [other.name for other in dependent if other.name not in attached]
        if others:
            raise NotAssignable(f"a reset of {device.name}'s bus would reset {', '.join(others)} too")
        return dependent

    def hot_reset(self, device: Device) -> None:
        """Reset the slot or bus of ``device``. Raises as ``dependent`` does: then nothing is reset."""
        self.backend.hot_reset(device, self.dependent(device))

    def rebind_kvm(self, kvm_vfio: KvmVfio | None) -> None:
        """Unregister the files from the old VM, then register them with another one, or with none.

        Raises ``OSError``; the old VM can then be restored in the same way. ``file_del`` after ``file_add`` would
        clear the VM of a group (kvm_vfio_file_del, virt/kvm/vfio.c).
        """
        for fd in self._files:
            self._unregister(fd)
        self._kvm_vfio = kvm_vfio
        for fd in self._files:
            self._register(fd)

    def file_add(self, fd: int) -> None:
        """Register a VFIO file with the VM. For the back end. Raises ``OSError``."""
        self._files.append(fd)
        self._register(fd)

    def file_del(self, fd: int) -> None:
        """Undo ``file_add``. For the back end. Idempotent. Raises ``OSError``."""
        if fd in self._files:
            self._files.remove(fd)
            self._unregister(fd)

    def _register(self, fd: int) -> None:
        if self._kvm_vfio:
            self._kvm_vfio.file_add(fd)

    def _unregister(self, fd: int) -> None:
        if self._kvm_vfio:
            with suppress(FileNotFoundError):  # file_add has failed
                self._kvm_vfio.file_del(fd)

    def close(self) -> None:
        """Detach every device. Runs every step even if one fails; idempotent."""
        with self._until_inactive():
            run_all(*(partial(self.detach, device) for device in self._devices), self._close_backend)

    def _close_backend(self) -> None:
        """Close it unless a device stays open, whose group or IOAS then stays, too."""
        if not self._devices:
            self.backend.close()

    # --- memory

    def _device_of(self, region: MemoryRegion) -> Device | None:
        """Return the device of this domain whose BAR the region is part of."""
        mapping = region.mapping
        return mapping.device if isinstance(mapping, RegionMapping) and mapping.device in self._devices else None

    def _reached(self, region: MemoryRegion) -> bool:
        """Return whether devices are to reach the region: guest memory, with peer-to-peer the domain's own BARs."""
        return region.kind.dma or (self.p2p and self._device_of(region) is not None)

    def _check_range(self, range_: Range, name: str, usable: tuple[Range, ...]) -> None:
        """Raise ``ReservedRange`` for a range in ``reserved``, or outside of ``usable`` unless that is empty."""
        line = find_reserved(range_, self._reserved)
        if line:
            raise ReservedRange(
                f"{name} {range_} falls into this host's reserved range {line}",
                "put it elsewhere: cat /sys/kernel/iommu_groups/*/reserved_regions lists what devices cannot reach",
            )
        if usable and not any(window.contains(range_) for window in usable):
            raise ReservedRange(f"{name} {range_} falls into addresses that the IOMMU of this host cannot translate")

    def map_all(self) -> None:
        """Map all regions that are not mapped (``kvm_iommu_map_memslots``). All or nothing. For the back end.

        Raises ``ReservedRange`` before anything is mapped, ``OSError``.
        """
        with self._memory.lock, undo_on_error() as undo:
            usable = self.backend.ranges()
            regions = [region for region in self._memory if self._reached(region)]
            for region in regions:
                self._check_range(region.range, region.name, usable)
            for region in regions:
                if region not in self._ledger:
                    self.map_region(region)
                    undo.callback(self.unmap_region, region)
            self._mapped = True

    def map_region(self, region: MemoryRegion) -> None:
        """Map one region by one call at its guest-physical address, ROM read-only (``kvm_iommu_map_pages``)."""
        mapping = DmaMapping(region.gpa, region.size, region.hva, region.kind.dma_writable)
        if isinstance(region.mapping, RegionMapping):
            mapping = replace(mapping, device=region.mapping.device.name, bar=region.mapping.index)
        self._ledger[region] = mapping
        try:
            self.backend.map(region)
        except OverflowError:  # raised before the ioctl
            del self._ledger[region]
            raise
        except BaseException as error:  # KeyboardInterrupt may be raised after the ioctl
            self._doubtful.add(region)
            run_all(partial(self.unmap_region, region), failure=error)
            raise
        log.info("map %s -> iova %#x, %s", region, mapping.iova, "rw" if mapping.writable else "ro")

    def unmap_region(self, region: MemoryRegion) -> None:
        """Undo ``map_region``. Raises ``AuditFailed`` if the kernel unmapped another size.

        Raises ``OSError``: the region stays in the ledger, and its memory mapped in this process.
        """
        mapping = self._ledger[region]
        unmapped = self.backend.unmap(region)
        del self._ledger[region]
        doubtful = region in self._doubtful
        self._doubtful.discard(region)
        if unmapped != mapping.size and not (doubtful and not unmapped):
            raise AuditFailed(
                f"{region.name}: {unmapped:#x} bytes were mapped at {mapping.iova:#x}, "
                f"the ledger has {mapping.size:#x}"
            )

    def unmap_all(self) -> None:
        """Unmap every region, then all that the ledger does not have. For the back end.

        Runs every step even if one fails. Raises ``AuditFailed`` if there was more than the ledger has, ``OSError``.
        """
        with self._memory.lock:
            self._mapped = False
            run_all(*(partial(self.unmap_region, region) for region in list(self._ledger)), self._check_none_left)

    def _check_none_left(self) -> None:
        if left := self.backend.unmap_rest():
            raise AuditFailed(f"{left:#x} bytes were mapped that the ledger does not have")

    def region_wanted(self, kind: RegionKind, range_: Range, name: str) -> None:
        """Refuse reserved ranges before anything is mapped, also while no device is attached."""
        if kind.dma:
            self._check_range(range_, name, self.backend.ranges() if self._mapped else ())

    def region_added(self, region: MemoryRegion) -> None:
        """Map a region of an active domain before it is used."""
        if self._mapped and self._reached(region):
            self.map_region(region)

    def region_removed(self, region: MemoryRegion) -> None:
        """Unmap a region before its memory is unmapped in this process."""
        if region in self._ledger:
            self.unmap_region(region)

    def holds(self, region: MemoryRegion) -> bool:
        """Return whether devices may still reach the region's memory."""
        return region in self._ledger

    # --- the invariant

    def audit(self) -> None:
        """Check that RAM is mapped writable, ROM read-only, each at its own address, and nothing else.

        With peer-to-peer the BARs that decode are mapped writable, too. Raises ``AuditFailed`` naming every
        difference. Without an attached device nothing may be mapped.
        """
        regions = [region for region in self._memory if self._mapped and self._reached(region)]
        wanted = {Mirrored(region.range, region.hva, region.kind.dma_writable) for region in regions}
        compare("DMA mappings", wanted, {Mirrored(Range(m.iova, m.size), m.hva, m.writable) for m in self.ledger})
