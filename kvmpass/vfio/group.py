"""VFIO groups and the type 1 container (include/uapi/linux/vfio.h, drivers/vfio/vfio_iommu_type1.c)."""

from __future__ import annotations

import errno
import time
import uuid
from dataclasses import dataclass

from kvmpass._fd import OwnedFd, check, closing_on_error, failure, open_node
from kvmpass._native import ffi, lib
from kvmpass.errors import GroupNotViable
from kvmpass.layout import Range
from kvmpass.vfio.device import Device

_IOMMU_REMEDY = {
    errno.EPERM: "no interrupt remapping: enable it in the firmware, or it is not safe to assign devices here",
    errno.EINVAL: "the firmware asks for one-to-one mapped memory for this device (IVRS IVMD); "
    "turning off pre-boot DMA protection in the firmware often removes it",
}


@dataclass(frozen=True, slots=True)
class IommuInfo:
    """``page_sizes``: bit mask of sizes in bytes; ``ranges``: usable I/O virtual addresses, in order."""

    page_sizes: int
    dma_available: int | None
    ranges: tuple[Range, ...]


class Container(OwnedFd):
    """A type 1 (version 2) IOMMU domain for the groups that join it. It works once a group has joined."""

    def __init__(self, path: str = "/dev/vfio/vfio") -> None:
        super().__init__(open_node(path))
        with closing_on_error(self):
            version = check(lib.vfio_get_api_version(self.fd), "VFIO_GET_API_VERSION")
            if version != lib.VFIO_API_VERSION:
                raise OSError(f"{path}: VFIO API version {version}, not {lib.VFIO_API_VERSION}")
            if not check(lib.vfio_check_extension(self.fd, lib.VFIO_TYPE1v2_IOMMU), "VFIO_CHECK_EXTENSION"):
                raise OSError(
                    errno.ENODEV, f"{path}: the kernel has no type 1 IOMMU driver (module vfio_iommu_type1)"
                )

    def set_iommu(self) -> None:
        """Make the domain. Needs a group; once for each time that the first group joins."""
        result = lib.vfio_set_iommu(self.fd, lib.VFIO_TYPE1v2_IOMMU)
        check(result, "VFIO_SET_IOMMU", remedy=_IOMMU_REMEDY.get(-result))

    def get_info(self) -> IommuInfo:
        """What the domain can translate; ranges can shrink with every group that joins."""
        info = ffi.new("struct kvmpass_iommu_info *")
        check(lib.vfio_iommu_get_info(self.fd, info), "VFIO_IOMMU_GET_INFO")
        ranges = tuple(
            Range(info.ranges[i].first, info.ranges[i].second - info.ranges[i].first + 1) for i in range(info.count)
        )
        return IommuInfo(info.page_sizes, info.dma_available if info.has_dma_available else None, ranges)

    def map_dma(self, iova: int, hva: int, size: int, *, writable: bool) -> None:
        """Pin ``size`` bytes of this process at ``hva`` and let the domain's devices reach them at ``iova``.

        Raises ``OSError``: ``ENOMEM`` over the memlock limit, ``ENOSPC`` no entries left (dma_entry_limit),
        ``EEXIST`` overlap, ``EINVAL`` alignment or a reserved range, ``EFAULT`` pages that cannot be pinned.
        """
        if iova + size == 1 << 64:
            # Linux 6.12 maps the last page of the address space and can neither find nor unpin it again.
            raise failure(
                errno.EINVAL, "VFIO_IOMMU_MAP_DMA", f"iova {Range(iova, size)}", "leave the last page alone"
            )
        flags = lib.VFIO_DMA_MAP_FLAG_READ | (lib.VFIO_DMA_MAP_FLAG_WRITE if writable else 0)
        result = lib.vfio_iommu_map_dma(self.fd, flags, hva, iova, size)
        check(result, "VFIO_IOMMU_MAP_DMA", f"iova {Range(iova, size)}", _MAP_REMEDY.get(-result))

    def unmap_all(self) -> int:
        """Undo every mapping of the container (``VFIO_DMA_UNMAP_FLAG_ALL``); returns how many bytes there were.

        Kernels older than 5.12 lack the flag: ``OSError`` (``EINVAL``).
        """
        unmapped = ffi.new("uint64_t *")
        result = lib.vfio_iommu_unmap_dma(self.fd, lib.VFIO_DMA_UNMAP_FLAG_ALL, 0, 0, unmapped)
        check(result, "VFIO_IOMMU_UNMAP_DMA", "everything")
        return int(unmapped[0])

    def unmap_dma(self, iova: int, size: int) -> int:
        """Undo a mapping; returns how many bytes were mapped there."""
        unmapped = ffi.new("uint64_t *")
        result = lib.vfio_iommu_unmap_dma(self.fd, 0, iova, size, unmapped)
        check(result, "VFIO_IOMMU_UNMAP_DMA", f"iova {Range(iova, size)}")
        return int(unmapped[0])


_MAP_REMEDY = {
    errno.EFAULT: "these pages cannot be pinned: nothing is mapped there, or a file that is written back to a disk "
    "(memfd, tmpfs and hugetlbfs can be pinned; others read-only)",
    errno.ENOMEM: "the memlock limit is too low or memory is short: raise it (ulimit -l) or run with CAP_IPC_LOCK",
    errno.ENOSPC: "raise the module parameter vfio_iommu_type1.dma_entry_limit",
}


class Group(OwnedFd):
    """One IOMMU group, held exclusively. ``number`` is that of /dev/vfio/NUMBER.

    Raises ``OSError`` (``EBUSY``: another process holds it; ``ENOENT``: no device of it is on vfio-pci) and
    ``GroupNotViable``.
    """

    def __init__(self, number: int, directory: str = "/dev/vfio") -> None:
        path = f"{directory}/{number}"
        self.number = number
        super().__init__(open_node(path))
        with closing_on_error(self):
            if not self.get_status() & lib.VFIO_GROUP_FLAGS_VIABLE:
                raise GroupNotViable(
                    f"IOMMU group {number} is not viable: a device of it is bound to a host driver",
                    "every device of the group must be on vfio-pci, or without a driver",
                )

    def get_status(self) -> int:
        """VFIO_GROUP_FLAGS_…"""
        return check(lib.vfio_group_get_status(self.fd), "VFIO_GROUP_GET_STATUS")

    @property
    def taken(self) -> bool:
        """Whether the host has unbound the group's last device from vfio-pci: what is left is an empty shell."""
        try:
            self.get_status()
        except OSError as error:
            return error.errno == errno.ENODEV
        return False

    def set_container(self, container: Container) -> None:
        """Join. The group's devices leave the host's own domain and can reach nothing until something is mapped."""
        result = lib.vfio_group_set_container(self.fd, container.fd)
        remedies = {
            errno.EPERM: "the group's DMA is owned elsewhere: a host driver or a process uses one of its devices",
            errno.EINVAL: _IOMMU_REMEDY[errno.EINVAL],
        }
        check(result, "VFIO_GROUP_SET_CONTAINER", f"group {self.number}", remedies.get(-result))

    def unset_container(self) -> None:
        """Leave. All of the group's devices must be closed; the last group takes all mappings with it."""
        check(lib.vfio_group_unset_container(self.fd), "VFIO_GROUP_UNSET_CONTAINER", f"group {self.number}")

    def get_device_fd(self, name: str, vf_token: uuid.UUID | None = None) -> Device:
        """Open the device called ``name`` (its PCI address). The kernel resets it if it can.

        ``vf_token``: the secret that a virtual function and its physical function share while the latter is on
        vfio-pci too; whoever opens the physical function first sets it (vfio_pci_core.c, vfio_pci_validate_vf_token).
        Raises ``OSError``: ``EACCES`` a token is needed or wrong, ``EINVAL`` one was given where none is used,
        ``ENODEV`` no device of this group has that name.
        """
        text = f"{name} vf_token={vf_token}" if vf_token else name
        started = time.monotonic()
        result = lib.vfio_group_get_device_fd(self.fd, text.encode())
        taken = time.monotonic() - started
        fd = check(result, "VFIO_GROUP_GET_DEVICE_FD", name, token_remedy(-result, vf_token))
        return Device(fd, name, taken)


def token_remedy(code: int, vf_token: uuid.UUID | None) -> str | None:
    """What may help where a device is not opened for want of the right VF token."""
    if code == errno.EACCES:
        return (
            "the VF token is not the one that the physical function was opened with"
            if vf_token
            else "a virtual function whose physical function is on vfio-pci, or the reverse, needs the VF token that "
            "both are opened with"
        )
    if code == errno.EINVAL and vf_token:
        return "a VF token is for SR-IOV functions whose physical function is on vfio-pci: leave it out"
    return None
