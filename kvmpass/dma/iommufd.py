"""iommufd as a back end: one I/O address space (IOAS), which devices are attached to by their character devices.

The order: open the device, register it with KVM, bind it to the iommufd, attach it to the IOAS, map all memory (the
first device). Memory that is mapped before is not pinned until the attach, whose failure does not name the region.
The IOAS is there from the first device until after the last one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from kvmpass._teardown import run_all, undo_on_error
from kvmpass.dma.backend import Mapper, Open
from kvmpass.errors import Closed
from kvmpass.iommufd import Iommufd
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio import Cdev, DependentDevice, Device, RegionMapping


class IommufdBackend:
    """A ``Backend``: one iommufd with one IOAS, opened for the first device and closed after the last.

    ``iommufd`` and ``cdev`` open it and the devices; by default by their nodes.

    Synchronization: see ``Backend``.
    """

    def __init__(
        self,
        mapper: Mapper,
        *,
        iommufd: Callable[[], Iommufd] | None = None,
        cdev: Callable[[str], Cdev] | None = None,
    ) -> None:
        self._mapper = mapper
        self._make_iommufd, self._make_cdev = iommufd, cdev
        self._iommufd: Iommufd | None = None
        self._ioas = 0
        self._devices: list[Cdev] = []
        self._attaching = 0

    @property
    def active(self) -> bool:
        """Whether the IOAS exists."""
        return self._iommufd is not None

    @contextmanager
    def attaching(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Iterator[Open]:
        """See ``Backend``. Only the first device maps memory."""

        def open_device() -> Callable[[], Device]:
            device.bind(self.iommufd.fd, vf_token)
            return attach

        def attach() -> Device:
            if self._mapper.p2p:
                device.check_p2p()
            undo.callback(device.detach)
            device.attach(self._ioas)
            self._mapper.map_all()
            return device

        with undo_on_error() as undo:
            first = not self._devices and not self._attaching
            if first:
                undo.callback(self.close)
            if self._iommufd is None:
                self._open()
            if first:
                undo.callback(self._mapper.unmap_all)
            device = (self._make_cdev or Cdev)(name)
            undo.callback(device.close)
            undo.callback(self._mapper.file_del, device.fd)
            self._mapper.file_add(device.fd)
            self._attaching += 1
            try:
                yield open_device
            finally:
                self._attaching -= 1
            self._devices.append(device)

    def detach(self, device: Device) -> None:
        """See ``Backend``. Its DMA is blocked first.

        Closing it alone would leave it attached while KVM, or a process that has its descriptor too, keeps it open.
        """
        attached = next(other for other in self._devices if other is device)
        last = (self._mapper.unmap_all, self.close) if self._devices == [device] else ()
        remove = partial(self._devices.remove, attached)
        run_all(attached.detach, partial(self._mapper.file_del, device.fd), device.close, remove, *last)

    def _open(self) -> None:
        iommufd = (self._make_iommufd or Iommufd)()
        with undo_on_error(iommufd.close):
            self._ioas = iommufd.ioas_alloc()
        self._iommufd = iommufd

    def close(self) -> None:
        """See ``Backend``. Raises ``OSError`` (``EBUSY``: a device could not be detached)."""
        if self._iommufd is not None:
            self._iommufd.destroy(self._ioas)
            iommufd, self._iommufd = self._iommufd, None
            iommufd.close()

    # --- mappings

    @property
    def iommufd(self) -> Iommufd:
        """The context. Raises ``Closed`` unless ``active``."""
        if self._iommufd is None:
            raise Closed("/dev/iommu is open only while a device is attached")
        return self._iommufd

    def map(self, region: MemoryRegion) -> None:
        """See ``Iommufd.ioas_map``. By address, also where the region is a file: see ``Iommufd.ioas_map_file``.

        A BAR is mapped by its dma-buf, as iommufd takes no address of one. The kernel revokes that mapping for good,
        and without notice, when memory decoding is turned off or the device is reset.
        """
        mapping, writable = region.mapping, region.kind.dma_writable
        if not isinstance(mapping, RegionMapping):
            self.iommufd.ioas_map(self._ioas, region.gpa, region.hva, region.size, writable=writable)
            return
        fd = mapping.device.export_dma_buf(mapping.index, mapping.area.start + region.offset, region.size)
        try:
            self.iommufd.ioas_map_file(self._ioas, region.gpa, fd, 0, region.size, writable=writable)
        finally:
            os.close(fd)  # the mapping keeps the dma-buf

    def unmap(self, region: MemoryRegion) -> int:
        """See ``Iommufd.ioas_unmap``."""
        try:
            return self.iommufd.ioas_unmap(self._ioas, region.gpa, region.size)
        except FileNotFoundError:  # nothing is mapped there
            return 0

    def unmap_rest(self) -> int:
        """See ``Iommufd.ioas_unmap_all``."""
        return self.iommufd.ioas_unmap_all(self._ioas)

    def ranges(self) -> tuple[Range, ...]:
        """See ``Iommufd.ioas_iova_ranges``. Each device can shrink them."""
        return self.iommufd.ioas_iova_ranges(self._ioas).allowed

    def hot_reset(self, device: Device, dependent: Sequence[DependentDevice]) -> None:
        """See ``Device.pci_hot_reset``. VFIO needs no groups of devices that are bound to one iommufd."""
        device.pci_hot_reset(())
