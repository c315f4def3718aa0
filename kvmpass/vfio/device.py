"""An open VFIO PCI device: its regions and interrupts."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvmpass._dataclass import dataclass
from kvmpass._fd import OwnedFd, check, failure
from kvmpass._native import ffi, lib
from kvmpass._teardown import undo_on_error
from kvmpass.errors import HostNotReady
from kvmpass.layout import GIB, PAGE, Range
from kvmpass.memory import HUGE, HostMapping

if TYPE_CHECKING:
    from kvmpass.vfio.group import Group

BAR0 = lib.VFIO_PCI_BAR0_REGION_INDEX
"""Region index of BAR 0; the others follow."""
ROM = lib.VFIO_PCI_ROM_REGION_INDEX
"""Region index of the expansion ROM."""
CONFIG = lib.VFIO_PCI_CONFIG_REGION_INDEX
"""Region index of configuration space."""
INTX = lib.VFIO_PCI_INTX_IRQ_INDEX
"""Interrupt index of INTx."""
MSI = lib.VFIO_PCI_MSI_IRQ_INDEX
"""Interrupt index of MSI."""
MSIX = lib.VFIO_PCI_MSIX_IRQ_INDEX
"""Interrupt index of MSI-X."""
ERR = lib.VFIO_PCI_ERR_IRQ_INDEX
"""Interrupt index of uncorrected errors, on PCI Express."""
REQ = lib.VFIO_PCI_REQ_IRQ_INDEX
"""Interrupt index of the host's requests to release the device."""


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """A region, as ``VFIO_DEVICE_GET_REGION_INFO`` describes it."""

    index: int
    """VFIO's region index."""
    size: int
    """Bytes."""
    offset: int
    """Where the region begins in the device's file."""
    readable: bool
    """Whether ``read`` is allowed."""
    writable: bool
    """Whether ``write`` is allowed."""
    mmap_areas: tuple[Range, ...]
    """The parts that can be mapped, relative to the region."""


@dataclass(frozen=True, eq=False, slots=True)
class Irqs:
    """One kind of a device's interrupts (``VFIO_DEVICE_GET_IRQ_INFO``): its vectors signal eventfds.

    Synchronization: from any thread.
    """

    device: Device
    """The open device."""
    index: int
    """VFIO's interrupt index."""
    count: int
    """Number of vectors; 0 where the device lacks this kind."""
    resizable: bool
    """Whether vectors can be added while others are enabled."""

    @property
    def name(self) -> str:
        """The device's PCI address."""
        return self.device.name

    def set_irqs(self, start: int, eventfds: Sequence[int]) -> None:
        """Signal ``eventfds`` for the vectors from ``start`` on (``VFIO_DEVICE_SET_IRQS``); -1 removes one.

        The first call for MSI or MSI-X enables it in the device. ERR and REQ have one vector, 0. Raises ``OSError``:
        ``ENOSPC`` too few vectors of the host, ``EINVAL`` a kind or vector that the device does not have.
        """
        flags = lib.VFIO_IRQ_SET_DATA_EVENTFD | lib.VFIO_IRQ_SET_ACTION_TRIGGER
        result = self._set(flags, start, len(eventfds), ffi.new("int32_t[]", list(eventfds) or 1))
        detail = f"vectors {start}-{start + len(eventfds) - 1}"
        if result > 0:  # the number of vectors that are possible: vfio_msi_enable() in vfio_pci_intrs.c
            result = -errno.ENOSPC
            detail += ": the host has no free interrupt vectors"
        self._check(result, detail)

    def set_unmask_eventfd(self, eventfd: int) -> None:
        """Unmask an automasked interrupt (INTx) when ``eventfd`` is signalled; -1 disconnects it.

        ``VFIO_DEVICE_SET_IRQS``. Raises ``OSError``.
        """
        flags = lib.VFIO_IRQ_SET_DATA_EVENTFD | lib.VFIO_IRQ_SET_ACTION_UNMASK
        self._check(self._set(flags, 0, 1, ffi.new("int32_t[]", [eventfd])), "unmask")

    def trigger(self, vector: int = 0) -> None:
        """Signal the eventfd of ``vector`` as if the device had raised it (``VFIO_IRQ_SET_DATA_NONE``).

        For tests and diagnosis. Does nothing where the vector has no eventfd. Raises ``OSError`` (``EINVAL``: this
        kind is disabled).
        """
        flags = lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER
        self._check(self._set(flags, vector, 1, ffi.NULL), f"trigger vector {vector}")

    def disable_irqs(self) -> None:
        """Disable all vectors (``VFIO_DEVICE_SET_IRQS``). Idempotent. Raises ``OSError``."""
        result = self._set(lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0, ffi.NULL)
        if result != -errno.EINVAL or not self.count:
            self._check(result, "disable")
        # else it is disabled: VFIO has no other reason for a kind that exists (vfio_pci_intrs.c)

    def _set(self, flags: int, start: int, count: int, data: Any) -> int:
        return lib.vfio_device_set_irqs(self.device.fd, flags, self.index, start, count, data)

    def _check(self, result: int, detail: str) -> None:
        check(result, "VFIO_DEVICE_SET_IRQS", f"{self.name} interrupt {self.index}, {detail}")


@dataclass(frozen=True, slots=True)
class DependentDevice:
    """A function that a slot or bus reset of another function resets too."""

    name: str
    """Its PCI address."""
    group: int | None
    """Its IOMMU group; None where the other function was opened by its character device."""
    devid: int | None
    """Else its device ID in the iommufd: 0 where it is owned through its group, -1 where it is not owned."""


class Region:
    """A BAR, the ROM or configuration space, accessed by system calls.

    ``read`` and ``write`` check the range; an access of 1, 2, 4 or 8 aligned bytes is one access of the device.

    Synchronization: from any thread.
    """

    def __init__(self, device: Device, info: RegionInfo) -> None:
        self._device = device
        self.info = info
        """Size, flags and mappable parts."""

    def __repr__(self) -> str:
        access = "r" * self.info.readable + "w" * self.info.writable + "m" * bool(self.info.mmap_areas)
        return f"<Region {self.info.index} of {self._device.name}, {self.size:#x} bytes, {access or 'no access'}>"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.info.size

    @property
    def mmap_areas(self) -> tuple[Range, ...]:
        """The parts that can be mapped, relative to the region."""
        return self.info.mmap_areas

    def _check(self, offset: int, size: int) -> int:
        if offset < 0 or size < 0 or offset + size > self.info.size:
            raise IndexError(f"{offset:#x}+{size:#x} is outside region {self.info.index} ({self.info.size:#x} bytes)")
        return self.info.offset + offset

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes. Raises ``IndexError`` outside of the region, ``OSError`` where VFIO refuses.

        ``EIO``: the device does not decode memory (or I/O) now.
        """
        data: bytes = self._access("pread", size, offset, size)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``. Raises as ``read`` does."""
        self._access("pwrite", data, offset, len(data))

    def _access(self, call: str, what: int | bytes, offset: int, size: int) -> Any:
        at = self._check(offset, size)
        try:
            done = getattr(os, call)(self._device.fd, what, at)
        except OSError as error:
            decoding = "turn on the device's decoding (AssignedDevice.enable, or its driver)"
            remedy = decoding if error.errno == errno.EIO else None
            raise failure(error.errno or 0, call, self._where(offset, size), remedy) from None
        if size != (len(done) if isinstance(done, bytes) else done):
            raise failure(errno.EIO, call, f"{self._where(offset, size)}: short access")
        return done

    def _where(self, offset: int, size: int) -> str:
        return f"{self._device.name} region {self.info.index}, {offset:#x}+{size:#x}"

    def read_int(self, offset: int, size: int = 4) -> int:
        """Read a little-endian register of ``size`` bytes. Raises as ``read`` does."""
        return int.from_bytes(self.read(offset, size), "little")

    def write_int(self, offset: int, value: int, size: int = 4) -> None:
        """Write a little-endian register of ``size`` bytes. Raises as ``read`` does, and ``OverflowError``."""
        self.write(offset, value.to_bytes(size, "little"))

    def mmap(self, area: Range) -> RegionMapping:
        """Map one of ``mmap_areas``. The mapping keeps the device open until it is closed. Raises ``OSError``.

        Aligned to the region's size from 2 MiB on, so that the kernel can use huge PFN maps.
        """
        return RegionMapping(self._device, self.info, area, self._check(area.start, area.size))


class RegionMapping(HostMapping):
    """Part of a device's region in this process: ``area`` of ``info``, at ``offset`` of the device's file."""

    def __init__(self, device: Device, info: RegionInfo, area: Range, offset: int) -> None:
        self.device = device
        """The device, which it keeps open."""
        self.index = info.index
        """VFIO's region index."""
        self.area = area
        """The part of the region."""
        align = PAGE if info.size < HUGE else min(GIB, 1 << (info.size - 1).bit_length())
        super().__init__(area.size, align=align, congruent=area.start, fd=device.fd, offset=offset)


class Device(OwnedFd):
    """One open PCI function (``VFIO_DEVICE_GET_INFO``).

    Opening and closing take most of their time for the reset that the kernel then does, if it can. Raises
    ``OSError``.

    Synchronization: ``close`` while no other thread uses the device; everything else from any thread.
    """

    def __init__(self, fd: int, name: str, open_seconds: float = 0.0) -> None:
        super().__init__(fd)
        self.name = name
        """Its PCI address."""
        self.open_seconds = open_seconds
        """How long opening it took."""
        self.close_seconds = 0.0
        """How long closing it took; 0 before."""
        with undo_on_error(self.close):
            self._read_info()

    def _read_info(self) -> None:
        info = ffi.new("struct kvmpass_device_info *")
        check(lib.vfio_device_get_info(self.fd, info), "VFIO_DEVICE_GET_INFO", self.name)
        if not info.flags & lib.VFIO_DEVICE_FLAGS_PCI:
            raise OSError(errno.ENODEV, f"{self.name} is not a PCI device for VFIO")
        self.resettable = bool(info.flags & lib.VFIO_DEVICE_FLAGS_RESET)
        """Whether ``reset`` is possible."""
        found = (self._region_info(index) for index in range(min(info.num_regions, CONFIG + 1)))
        self.regions = {region.index: Region(self, region) for region in found if region is not None}
        """The regions that the device has, by VFIO's index."""
        kinds = (self._irq_info(index) for index in range(min(info.num_irqs, REQ + 1)))
        self.irqs = {irqs.index: irqs for irqs in kinds if irqs is not None}
        """Interrupts by VFIO's index. ERR and REQ are absent where the kernel cannot signal them."""

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if not self.closed:
            started = time.monotonic()
            super().close()
            self.close_seconds = time.monotonic() - started

    @property
    def resets_at_close(self) -> bool:
        """Whether the kernel resets it when it is closed."""
        return self.resettable

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
                areas = tuple(Range(area.first, area.second) for area in info.areas[0 : info.count])
        return RegionInfo(
            index,
            info.size,
            info.offset,
            bool(info.flags & lib.VFIO_REGION_INFO_FLAG_READ),
            bool(info.flags & lib.VFIO_REGION_INFO_FLAG_WRITE),
            tuple(area for area in areas if area.size),
        )

    def _irq_info(self, index: int) -> Irqs | None:
        info = ffi.new("struct kvmpass_irq_info *")
        result = lib.vfio_device_get_irq_info(self.fd, index, info)
        if result == -errno.EINVAL:
            return None
        check(result, "VFIO_DEVICE_GET_IRQ_INFO", f"{self.name} interrupt {index}")
        return Irqs(self, index, info.count, not info.flags & lib.VFIO_IRQ_INFO_NORESIZE)

    def check_p2p(self) -> None:
        """Raise ``HostNotReady`` unless VFIO exports the device's BARs (``VFIO_DEVICE_FEATURE_DMA_BUF``)."""
        if lib.vfio_device_feature_probe(self.fd, lib.KVMPASS_VFIO_FEATURE_DMA_BUF) < 0:
            raise HostNotReady(
                f"peer-to-peer is unavailable: VFIO does not export the BARs of {self.name} as dma-bufs: Linux 6.19 "
                f"and later do, with CONFIG_PCI_P2PDMA; this is {os.uname().release}",
                "use the back end type1, or do without peer-to-peer",
            )

    def export_dma_buf(self, bar: int, offset: int, size: int) -> int:
        """Export ``size`` bytes of a BAR, from ``offset`` on, as a dma-buf; return its descriptor.

        Both are multiples of a page. ``VFIO_DEVICE_FEATURE_DMA_BUF``: what imports it loses it, without notice to
        the process, when the device is reset or does not decode memory (drivers/vfio/pci/vfio_pci_dmabuf.c). Raises
        ``OSError``: ``ENOTTY`` and ``EOPNOTSUPP`` where the kernel has none, ``EINVAL`` outside of the BAR.
        """
        result = lib.vfio_device_feature_dma_buf(self.fd, bar, offset, size)
        return check(result, "VFIO_DEVICE_FEATURE_DMA_BUF", f"{self.name} BAR {bar}, {offset:#x}+{size:#x}")

    def reset(self) -> None:
        """Reset the function (``VFIO_DEVICE_RESET``). Raises ``OSError`` (``EINVAL``: not ``resettable``)."""
        check(lib.vfio_device_reset(self.fd), "VFIO_DEVICE_RESET", self.name)

    def get_pci_hot_reset_info(self) -> list[DependentDevice]:
        """Return the functions that a reset of this device's slot or bus resets, this device included.

        Not the IOMMU group: there can be more or fewer. Raises ``OSError``: ``ENODEV`` where neither slot nor bus can
        be reset, such as on a root bus; ``EPERM`` where a function of the bus is in no group.
        (``VFIO_DEVICE_GET_PCI_HOT_RESET_INFO``.)
        """
        info = ffi.new("struct kvmpass_hot_reset_info *")
        check(lib.vfio_device_get_pci_hot_reset_info(self.fd, info), "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", self.name)
        by_devid = bool(info.flags & lib.VFIO_PCI_HOT_RESET_FLAG_DEV_ID)
        found = []
        for device in info.devices[0 : info.count]:
            name = f"{device.segment:04x}:{device.bus:02x}:{device.devfn >> 3:02x}.{device.devfn & 7}"
            signed = int(ffi.cast("int32_t", device.id))
            found.append(DependentDevice(name, None if by_devid else signed, signed if by_devid else None))
        return found

    def pci_hot_reset(self, groups: Sequence[Group]) -> None:
        """Reset the slot or bus of this device, and all dependent devices (``VFIO_DEVICE_PCI_HOT_RESET``).

        ``groups``: those of all open dependent devices; empty where the devices were opened for an iommufd.
        Raises ``OSError``: ``ENODEV`` neither slot nor bus can be reset; ``EINVAL`` a dependent device is in none of
        the groups, or not bound to a VFIO driver.
        """
        array = ffi.new("int32_t[]", [group.fd for group in groups] or 1)
        result = lib.vfio_device_pci_hot_reset(self.fd, len(groups), array)
        detail = f"{self.name} with groups {', '.join(str(group.number) for group in groups) or '(none)'}"
        check(result, "VFIO_DEVICE_PCI_HOT_RESET", detail, _HOT_RESET_REMEDY.get(-result))


_HOT_RESET_REMEDY = {
    errno.EINVAL: "bind every device of get_pci_hot_reset_info() to vfio-pci, and pass the group of each open one",
    errno.ENODEV: "use another reset: the device is on a root bus, or its bridge does not permit a reset of the bus",
}
