"""/dev/iommu: I/O address spaces (IOAS), and what is mapped in them."""

from __future__ import annotations

import errno

from kvmpass._dataclass import dataclass
from kvmpass._fd import OwnedFd, check, failure, open_node
from kvmpass._native import ffi, lib
from kvmpass.errors import BadDescriptor
from kvmpass.layout import PAGE, Range

NODE = "/dev/iommu"

_EVERYTHING = (1 << 64) - 1
_MAP_REMEDY = {
    errno.EFAULT: "use memory that can be pinned: anonymous, memfd, tmpfs or hugetlbfs; other files only read-only",
    errno.ENOMEM: "raise the memlock limit (ulimit -l), which iommufd counts for each user over all processes, or "
    "run with CAP_IPC_LOCK; or free memory",
}
_NO_DIRTY_TRACKING = "leave out dirty_tracking: this IOMMU lacks it (AMD-Vi: HDSup of its extended features)"


@dataclass(frozen=True, slots=True)
class IovaRanges:
    """What an IOAS can translate; each attached device can shrink it."""

    allowed: tuple[Range, ...]
    """The I/O virtual addresses that can be mapped, in order."""
    alignment: int
    """Bytes: addresses and lengths of mappings are multiples of it."""

    @property
    def reserved(self) -> tuple[Range, ...]:
        """The addresses of 64 bits outside of the allowed ranges."""
        ends = [0, *(range_.end for range_ in self.allowed)]
        starts = [*(range_.start for range_ in self.allowed), 1 << 64]
        return tuple(Range(end, start - end) for end, start in zip(ends, starts, strict=True) if start > end)


@dataclass(frozen=True, slots=True)
class HwInfo:
    """What the IOMMU of a device can do."""

    dirty_tracking: bool
    """Whether it records which pages devices write. False before Linux 6.7, which does not report it."""


class Iommufd(OwnedFd):
    """One context of ``/dev/iommu``. Its objects have IDs; they end with the last descriptor and the last device.

    ``fd``: one that is open already, which the object then owns. Raises ``OSError``: ``ENOENT`` and ``ENODEV`` where
    the kernel lacks iommufd, ``EACCES``.

    Synchronization: the kernel's own; any thread.
    """

    def __init__(self, path: str = NODE, *, fd: int | None = None) -> None:
        super().__init__(open_node(path) if fd is None else fd)

    def check_unused(self) -> None:
        """Check that the context has no objects. Raises ``BadDescriptor``, ``OSError``.

        The kernel gives each object the lowest free ID, from 1 on (drivers/iommu/iommufd/main.c).
        """
        numbers = [self.ioas_alloc(), self.ioas_alloc()]
        for number in numbers:
            self.destroy(number)
        if numbers != [1, 2]:
            raise BadDescriptor("the iommufd has devices or mappings already", "open /dev/iommu once for each VM")

    def ioas_alloc(self) -> int:
        """Create an empty I/O address space; return its number (``IOMMU_IOAS_ALLOC``). Raises ``OSError``."""
        ioas = ffi.new("uint32_t *")
        check(lib.iommufd_ioas_alloc(self.fd, ioas), "IOMMU_IOAS_ALLOC")
        return int(ioas[0])

    def destroy(self, number: int) -> None:
        """Destroy an object, with all mappings of an IOAS (``IOMMU_DESTROY``).

        Raises ``OSError``: ``EBUSY`` while it is used, as an IOAS is by an attached device.
        """
        check(lib.iommufd_destroy(self.fd, number), "IOMMU_DESTROY", f"object {number}")

    def ioas_iova_ranges(self, ioas: int) -> IovaRanges:
        """Return what the IOAS can translate: everything until a device is attached (``IOMMU_IOAS_IOVA_RANGES``)."""
        found = ffi.new("struct kvmpass_iova_ranges *")
        check(lib.iommufd_ioas_iova_ranges(self.fd, ioas, found), "IOMMU_IOAS_IOVA_RANGES", f"IOAS {ioas}")
        ranges = (found.ranges[i] for i in range(found.count))
        return IovaRanges(
            tuple(Range(range_.first, range_.second - range_.first + 1) for range_ in ranges), int(found.alignment)
        )

    def ioas_map(self, ioas: int, iova: int, hva: int, size: int, *, writable: bool) -> None:
        """Map ``size`` bytes of this process at ``hva`` to ``iova`` for the devices of an IOAS (``IOMMU_IOAS_MAP``).

        The memory is pinned once a device is attached. Raises ``OSError``: ``EEXIST`` overlap, ``EINVAL`` a reserved
        range or alignment, ``ENOMEM`` over the memlock limit, ``EFAULT`` pages that cannot be pinned.
        """
        result = lib.iommufd_ioas_map(self.fd, _flags(writable), ioas, hva, size, iova)
        check(result, "IOMMU_IOAS_MAP", f"iova {Range(iova, size)}", _MAP_REMEDY.get(-result))

    def ioas_map_file(self, ioas: int, iova: int, fd: int, offset: int, size: int, *, writable: bool) -> None:
        """Map ``size`` bytes of the memfd ``fd`` from ``offset`` on, else as ``ioas_map`` (``IOMMU_IOAS_MAP_FILE``).

        The kernel checks neither how ``fd`` was opened nor its seals: with ``writable`` devices can write to a memfd
        that is open for reading only, or sealed. So guest memory is mapped by address. ``fd`` may also be a dma-buf
        (Linux 6.19). Raises ``OSError``: ``EOPNOTSUPP`` where the running kernel lacks it (before Linux 6.13);
        ``ENODEV`` where the dma-buf is revoked.
        """
        result = lib.iommufd_ioas_map_file(self.fd, _flags(writable), ioas, fd, offset, size, iova)
        if result == -errno.ENOTTY:
            raise failure(errno.EOPNOTSUPP, "IOMMU_IOAS_MAP_FILE", "Linux 6.13 and later have it")
        check(result, "IOMMU_IOAS_MAP_FILE", f"iova {Range(iova, size)}", _MAP_REMEDY.get(-result))

    def ioas_unmap(self, ioas: int, iova: int, size: int) -> int:
        """Undo the mappings in a range, which must contain all of each; return their size in bytes.

        ``IOMMU_IOAS_UNMAP``. Raises ``OSError`` (``ENOENT``: there is none).
        """
        return self._unmap(ioas, iova, size, f"iova {Range(iova, size)}")

    def ioas_unmap_all(self, ioas: int) -> int:
        """Undo all mappings of the IOAS; return their size in bytes (``IOMMU_IOAS_UNMAP``). Raises ``OSError``."""
        return self._unmap(ioas, 0, _EVERYTHING, "everything")

    def _unmap(self, ioas: int, iova: int, size: int, detail: str) -> int:
        unmapped = ffi.new("uint64_t *")
        check(lib.iommufd_ioas_unmap(self.fd, ioas, iova, size, unmapped), "IOMMU_IOAS_UNMAP", detail)
        return int(unmapped[0])

    # --- which pages devices write

    def get_hw_info(self, devid: int) -> HwInfo:
        """Return what the IOMMU of a bound device can do (``IOMMU_GET_HW_INFO``). Raises ``OSError``.

        ``devid`` is what ``Cdev.bind`` returned.
        """
        capabilities = ffi.new("uint64_t *")
        check(lib.iommufd_get_hw_info(self.fd, devid, capabilities), "IOMMU_GET_HW_INFO", f"device {devid}")
        return HwInfo(bool(capabilities[0] & lib.KVMPASS_IOMMU_HW_CAP_DIRTY_TRACKING))

    def hwpt_alloc(self, devid: int, ioas: int, *, dirty_tracking: bool = False) -> int:
        """Create a page table of the IOMMU with the mappings of an IOAS; return its number (``IOMMU_HWPT_ALLOC``).

        For the devices that share the IOMMU of ``devid``: ``Cdev.attach`` takes it instead of the IOAS. ``destroy``
        it after the last one is detached. Raises ``OSError``: ``EOPNOTSUPP`` the IOMMU has no dirty tracking.
        """
        hwpt = ffi.new("uint32_t *")
        flags = lib.KVMPASS_IOMMU_HWPT_ALLOC_DIRTY_TRACKING if dirty_tracking else 0
        result = lib.iommufd_hwpt_alloc(self.fd, flags, devid, ioas, hwpt)
        unsupported = dirty_tracking and result == -errno.EOPNOTSUPP
        check(result, "IOMMU_HWPT_ALLOC", f"device {devid}, IOAS {ioas}", _NO_DIRTY_TRACKING if unsupported else None)
        return int(hwpt[0])

    def hwpt_set_dirty_tracking(self, hwpt: int, enable: bool) -> None:
        """Begin or end to record which pages devices write (``IOMMU_HWPT_SET_DIRTY_TRACKING``).

        Raises ``OSError``: ``EOPNOTSUPP`` where the page table was not made with ``dirty_tracking``.
        """
        flags = lib.KVMPASS_IOMMU_HWPT_DIRTY_TRACKING_ENABLE if enable else 0
        check(
            lib.iommufd_hwpt_set_dirty_tracking(self.fd, hwpt, flags), "IOMMU_HWPT_SET_DIRTY_TRACKING", f"HWPT {hwpt}"
        )

    def hwpt_get_dirty_bitmap(self, hwpt: int, range_: Range, page_size: int = PAGE) -> bytes:
        """Return which pages of ``range_`` devices have written since the last call, and clear the record.

        ``IOMMU_HWPT_GET_DIRTY_BITMAP``. Bit ``n`` (bit ``n % 8`` of byte ``n // 8``) stands for the ``n``-th page.
        ``page_size`` is in bytes. Raises ``OSError``: ``EINVAL`` the range does not consist of such pages, or
        tracking is off (drivers/iommu/amd/iommu.c).
        """
        words = ffi.new("uint64_t[]", -(-range_.size // (page_size * 64)))
        result = lib.iommufd_hwpt_get_dirty_bitmap(self.fd, hwpt, range_.start, range_.size, page_size, words)
        check(result, "IOMMU_HWPT_GET_DIRTY_BITMAP", f"HWPT {hwpt}, iova {range_}")
        return bytes(ffi.buffer(words))[: -(-range_.size // (page_size * 8))]


def _flags(writable: bool) -> int:
    flags = lib.KVMPASS_IOAS_FIXED_IOVA | lib.KVMPASS_IOAS_READABLE
    return flags | lib.KVMPASS_IOAS_WRITEABLE if writable else flags
