"""An open VFIO PCI device: its regions and interrupts."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from kvmpass._fd import OwnedFd, check, closing_on_error
from kvmpass._native import ffi, lib
from kvmpass.layout import Range
from kvmpass.memory import HostMapping

BAR0 = lib.VFIO_PCI_BAR0_REGION_INDEX
ROM = lib.VFIO_PCI_ROM_REGION_INDEX
CONFIG = lib.VFIO_PCI_CONFIG_REGION_INDEX
INTX = lib.VFIO_PCI_INTX_IRQ_INDEX
MSI = lib.VFIO_PCI_MSI_IRQ_INDEX
MSIX = lib.VFIO_PCI_MSIX_IRQ_INDEX


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """``mmap_areas``: the parts (offset in the region) that may be mapped; all of it where none is named."""

    index: int
    size: int
    offset: int
    readable: bool
    writable: bool
    mmap_areas: tuple[Range, ...]
    msix_mappable: bool


@dataclass(frozen=True, slots=True)
class IrqInfo:
    index: int
    count: int
    eventfd: bool
    maskable: bool
    automasked: bool
    resizable: bool


class Region:
    """A BAR, the ROM or configuration space, reached by system calls.

    ``read`` and ``write`` check the range; an access of 1, 2, 4 or 8 aligned bytes is one access of the device.
    """

    def __init__(self, device: Device, info: RegionInfo) -> None:
        self._device = device
        self.info = info

    @property
    def size(self) -> int:
        return self.info.size

    def _check(self, offset: int, size: int) -> int:
        if offset < 0 or size < 0 or offset + size > self.info.size:
            raise IndexError(f"{offset:#x}+{size:#x} is outside region {self.info.index} ({self.info.size:#x} bytes)")
        return self.info.offset + offset

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes. Raises ``IndexError`` outside the region, ``OSError`` where VFIO refuses."""
        data = os.pread(self._device.fd, size, self._check(offset, size))
        if len(data) != size:
            raise OSError(errno.EIO, f"{self._device.name} region {self.info.index}: short read at {offset:#x}")
        return data

    def write(self, offset: int, data: bytes) -> None:
        at = self._check(offset, len(data))
        if os.pwrite(self._device.fd, data, at) != len(data):
            raise OSError(errno.EIO, f"{self._device.name} region {self.info.index}: short write at {offset:#x}")

    def read_int(self, offset: int, size: int = 4) -> int:
        """A little-endian register."""
        return int.from_bytes(self.read(offset, size), "little")

    def write_int(self, offset: int, value: int, size: int = 4) -> None:
        self.write(offset, value.to_bytes(size, "little"))

    def mmap(self, area: Range) -> HostMapping:
        """Map one of ``mmap_areas``; a mapping keeps the device busy until it is closed.

        Aligned to the region's size, so that the kernel can use huge PFN maps.
        """
        at = self._check(area.start, area.size)
        align = max(4096, min(1 << 30, 1 << (self.info.size - 1).bit_length()))
        return HostMapping(area.size, align=align, congruent=area.start, fd=self._device.fd, offset=at)


class Device(OwnedFd):
    """One function. Regions that the device lacks are absent from ``regions``, which is keyed by index."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name
        with closing_on_error(self):
            info = ffi.new("struct kvmpass_device_info *")
            check(lib.vfio_device_get_info(self.fd, info), "VFIO_DEVICE_GET_INFO", name)
            if not info.flags & lib.VFIO_DEVICE_FLAGS_PCI:
                raise OSError(errno.ENODEV, f"{name} is not a PCI device for VFIO")
            self.resettable = bool(info.flags & lib.VFIO_DEVICE_FLAGS_RESET)
            found = (self._region_info(index) for index in range(min(info.num_regions, CONFIG + 1)))
            self.regions = {region.index: Region(self, region) for region in found if region is not None}
            self.irqs = {index: self._irq_info(index) for index in range(min(info.num_irqs, MSIX + 1))}

    @property
    def config(self) -> Region:
        """Configuration space: 256 or 4096 bytes."""
        return self.regions[CONFIG]

    def _region_info(self, index: int) -> RegionInfo | None:
        info = ffi.new("struct kvmpass_region_info *")
        result = lib.vfio_device_get_region_info(self.fd, index, info)
        if result == -errno.EINVAL:
            return None
        check(result, "VFIO_DEVICE_GET_REGION_INFO", f"{self.name} region {index}")
        if not info.size:
            return None
        areas: tuple[Range, ...] = ()
        if info.flags & lib.VFIO_REGION_INFO_FLAG_MMAP:
            areas = (Range(0, info.size),)
            if info.has_sparse:
                areas = tuple(Range(info.areas[i].first, info.areas[i].second) for i in range(info.count))
        return RegionInfo(
            index,
            info.size,
            info.offset,
            bool(info.flags & lib.VFIO_REGION_INFO_FLAG_READ),
            bool(info.flags & lib.VFIO_REGION_INFO_FLAG_WRITE),
            tuple(area for area in areas if area.size),
            bool(info.msix_mappable),
        )

    def _irq_info(self, index: int) -> IrqInfo:
        info = ffi.new("struct kvmpass_irq_info *")
        check(lib.vfio_device_get_irq_info(self.fd, index, info), "VFIO_DEVICE_GET_IRQ_INFO", self.name)
        return IrqInfo(
            index,
            info.count,
            bool(info.flags & lib.VFIO_IRQ_INFO_EVENTFD),
            bool(info.flags & lib.VFIO_IRQ_INFO_MASKABLE),
            bool(info.flags & lib.VFIO_IRQ_INFO_AUTOMASKED),
            not info.flags & lib.VFIO_IRQ_INFO_NORESIZE,
        )

    def set_irqs(self, index: int, start: int, eventfds: Sequence[int]) -> None:
        """Let the device's interrupts ``start``… signal ``eventfds``; -1 detaches one.

        The first call for MSI-X enables it in the device. Raises ``OSError`` (``ENOSPC`` too few host vectors).
        """
        array = ffi.new("int32_t[]", list(eventfds) or 1)
        flags = lib.VFIO_IRQ_SET_DATA_EVENTFD | lib.VFIO_IRQ_SET_ACTION_TRIGGER
        result = lib.vfio_device_set_irqs(self.fd, flags, index, start, len(eventfds), array)
        detail = f"{self.name} interrupt {index}, vectors {start}-{start + len(eventfds) - 1}"
        if result > 0:  # fewer vectors than asked for: vfio_msi_enable() in vfio_pci_intrs.c
            result = -errno.ENOSPC
            detail += ": the host has no free interrupt vectors"
        check(result, "VFIO_DEVICE_SET_IRQS", detail)

    def set_unmask_eventfd(self, index: int, eventfd: int) -> None:
        """Let a signal on ``eventfd`` unmask an automasked interrupt (INTx) in the kernel; -1 ends that."""
        flags = lib.VFIO_IRQ_SET_DATA_EVENTFD | lib.VFIO_IRQ_SET_ACTION_UNMASK
        result = lib.vfio_device_set_irqs(self.fd, flags, index, 0, 1, ffi.new("int32_t[]", [eventfd]))
        check(result, "VFIO_DEVICE_SET_IRQS", f"{self.name} interrupt {index}, unmask")

    def disable_irqs(self, index: int) -> None:
        """Turn the whole index off; harmless where it is off."""
        flags = lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER
        result = lib.vfio_device_set_irqs(self.fd, flags, index, 0, 0, ffi.NULL)
        check(result, "VFIO_DEVICE_SET_IRQS", f"{self.name} interrupt {index}")

    def reset(self) -> None:
        """Function or power-management reset, as VFIO chooses. ``OSError`` (``EINVAL``) where it has none."""
        check(lib.vfio_device_reset(self.fd), "VFIO_DEVICE_RESET", self.name)
