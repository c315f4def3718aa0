"""VFIO groups and the type 1 container (include/uapi/linux/vfio.h, drivers/vfio/vfio_iommu_type1.c)."""

from __future__ import annotations

import errno
import time
import uuid

from kvmpass._fd import OwnedFd, check, failure, open_node
from kvmpass._native import ffi, lib
from kvmpass._teardown import undo_on_error
from kvmpass.errors import BadDescriptor, GroupNotViable, HostNotReady
from kvmpass.layout import Range
from kvmpass.vfio.device import Device

_IOMMU_REMEDY = {
    errno.EPERM: "enable interrupt remapping in the firmware, without which assignment is not safe",
    errno.EINVAL: "turn off pre-boot DMA protection in the firmware, which requires a direct-mapped region for this "
    "device (IVRS IVMD)",
}


class Container(OwnedFd):
    """A type 1 (version 2) container: one IOMMU domain for the groups that join it.

    ``fd``: one that is open already, which the object then owns. Raises ``OSError`` (``ENODEV``: no type 1 driver).

    Synchronization: ``close`` while no other thread uses the container; everything else from any thread.
    """

    def __init__(self, path: str = "/dev/vfio/vfio", *, fd: int | None = None) -> None:
        super().__init__(open_node(path) if fd is None else fd)
        with undo_on_error(self.close):
            version = check(lib.vfio_get_api_version(self.fd), "VFIO_GET_API_VERSION")
            if version != lib.VFIO_API_VERSION:
                raise OSError(f"{path}: VFIO API version {version}, not {lib.VFIO_API_VERSION}")
            if not check(lib.vfio_check_extension(self.fd, lib.VFIO_TYPE1v2_IOMMU), "VFIO_CHECK_EXTENSION"):
                raise OSError(
                    errno.ENODEV, f"{path}: the kernel has no type 1 IOMMU driver (module vfio_iommu_type1)"
                )

    def check_unused(self) -> None:
        """Check that no group has joined. Raises ``BadDescriptor``.

        Only a container with an IOMMU answers ``VFIO_IOMMU_GET_INFO``, and only one with a group gets an IOMMU
        (drivers/vfio/container.c).
        """
        info = ffi.new("struct kvmpass_iommu_info *")
        used = lib.vfio_iommu_get_info(self.fd, info) >= 0 or lib.vfio_set_iommu(self.fd, lib.VFIO_TYPE1v2_IOMMU) >= 0
        if used:
            raise BadDescriptor("the container has a group already", "open /dev/vfio/vfio once for each VM")

    def check_p2p(self) -> None:
        """Raise ``HostNotReady`` unless the container takes a device's BAR for DMA, before a group joins.

        That of iommufd (drivers/iommu/iommufd/vfio_compat.c) refuses it. It is known by an ioctl that only iommufd
        has: there is no object 0 (``ENOENT``).
        """
        ranges = ffi.new("struct kvmpass_iova_ranges *")
        if lib.iommufd_ioas_iova_ranges(self.fd, 0, ranges) == -errno.ENOENT:
            raise HostNotReady(
                "peer-to-peer is unavailable: iommufd serves this kernel's VFIO containers, and maps no BAR in them",
                "use the back end iommufd, on Linux 6.19 or later, or do without peer-to-peer",
            )

    def set_iommu(self) -> None:
        """Create the domain (``VFIO_SET_IOMMU``), after the first group has joined. Raises ``OSError``."""
        result = lib.vfio_set_iommu(self.fd, lib.VFIO_TYPE1v2_IOMMU)
        check(result, "VFIO_SET_IOMMU", remedy=_IOMMU_REMEDY.get(-result))

    def iova_ranges(self) -> tuple[Range, ...]:
        """Return the usable I/O virtual addresses, in order (``VFIO_IOMMU_GET_INFO``). Raises ``OSError``.

        Each group that joins can shrink them. Empty where the kernel does not list them.
        """
        info = ffi.new("struct kvmpass_iommu_info *")
        check(lib.vfio_iommu_get_info(self.fd, info), "VFIO_IOMMU_GET_INFO")
        return tuple(Range(found.first, found.second - found.first + 1) for found in info.ranges[0 : info.count])

    def map_dma(self, iova: int, hva: int, size: int, *, writable: bool) -> None:
        """Pin ``size`` bytes at ``hva`` and map them at ``iova``, all multiples of a page (``VFIO_IOMMU_MAP_DMA``).

        Raises ``OSError``: ``ENOMEM`` over the memlock limit, ``ENOSPC`` no entries left (dma_entry_limit),
        ``EEXIST`` overlap, ``EINVAL`` alignment or a reserved range, ``EFAULT`` pages that cannot be pinned.
        """
        if iova + size == 1 << 64:
            # Linux 6.12 maps the last page of the address space, and can then neither find nor unpin it.
            raise failure(errno.EINVAL, "VFIO_IOMMU_MAP_DMA", f"iova {Range(iova, size)}", "do not map the last page")
        flags = lib.VFIO_DMA_MAP_FLAG_READ | (lib.VFIO_DMA_MAP_FLAG_WRITE if writable else 0)
        result = lib.vfio_iommu_map_dma(self.fd, flags, hva, iova, size)
        check(result, "VFIO_IOMMU_MAP_DMA", f"iova {Range(iova, size)}", _MAP_REMEDY.get(-result))

    def unmap_all(self) -> int:
        """Undo all mappings (``VFIO_DMA_UNMAP_FLAG_ALL``). Return the number of bytes that were mapped.

        Raises ``OSError`` (``EINVAL``: Linux before 5.12).
        """
        unmapped = ffi.new("uint64_t *")
        result = lib.vfio_iommu_unmap_dma(self.fd, lib.VFIO_DMA_UNMAP_FLAG_ALL, 0, 0, unmapped)
        check(result, "VFIO_IOMMU_UNMAP_DMA", "everything")
        return int(unmapped[0])

    def unmap_dma(self, iova: int, size: int) -> int:
        """Undo a mapping (``VFIO_IOMMU_UNMAP_DMA``). Return the number of bytes that were mapped there."""
        unmapped = ffi.new("uint64_t *")
        result = lib.vfio_iommu_unmap_dma(self.fd, 0, iova, size, unmapped)
        check(result, "VFIO_IOMMU_UNMAP_DMA", f"iova {Range(iova, size)}")
        return int(unmapped[0])


_MAP_REMEDY = {
    errno.EFAULT: "use memory that can be pinned: anonymous, memfd, tmpfs or hugetlbfs; other files only read-only",
    errno.ENOMEM: "raise the memlock limit (ulimit -l) or run with CAP_IPC_LOCK; or free memory",
    errno.ENOSPC: "raise the module parameter vfio_iommu_type1.dma_entry_limit",
}


class Group(OwnedFd):
    """One IOMMU group, opened exclusively by its file ``/dev/vfio/NUMBER``.

    ``fd``: one that is open already, which the object then owns. Raises ``OSError`` (``EBUSY``: another process has
    it open; ``ENOENT``: no device of it is bound to a VFIO driver), ``GroupNotViable``, and ``BadDescriptor`` for an
    open one that is in a container.

    Synchronization: ``close`` while no other thread uses the group; everything else from any thread.
    """

    def __init__(self, number: int, directory: str = "/dev/vfio", *, fd: int | None = None) -> None:
        self.number = number
        """Its number in ``/sys/kernel/iommu_groups``."""
        super().__init__(open_node(f"{directory}/{number}") if fd is None else fd)
        with undo_on_error(self.close):
            flags = self.get_status()
            if flags & lib.VFIO_GROUP_FLAGS_CONTAINER_SET:
                raise BadDescriptor(
                    f"IOMMU group {number} is in a container already",
                    f"open /dev/vfio/{number} for one VM, and leave VFIO_GROUP_SET_CONTAINER to it",
                )
            if not flags & lib.VFIO_GROUP_FLAGS_VIABLE:
                raise GroupNotViable(
                    f"IOMMU group {number} is not viable: a device of it is bound to a host driver",
                    "bind every device of the group to vfio-pci, or unbind it",
                )

    def get_status(self) -> int:
        """Return the group's flags, ``VFIO_GROUP_FLAGS_…`` (``VFIO_GROUP_GET_STATUS``). Raises ``OSError``."""
        return check(lib.vfio_group_get_status(self.fd), "VFIO_GROUP_GET_STATUS")

    @property
    def removed(self) -> bool:
        """Whether VFIO has removed the group, as its last device was unbound (``vfio_device_remove_group``)."""
        try:
            self.get_status()
        except OSError as error:
            return error.errno == errno.ENODEV
        return False

    def set_container(self, container: Container) -> None:
        """Join a container (``VFIO_GROUP_SET_CONTAINER``). Raises ``OSError``.

        The group's devices leave the host's domain and reach no memory until something is mapped.
        """
        result = lib.vfio_group_set_container(self.fd, container.fd)
        remedies = {
            errno.EPERM: "bind all devices of the group to vfio-pci, and end the processes that use one: the group's "
            "DMA has another owner",
            errno.EINVAL: _IOMMU_REMEDY[errno.EINVAL],
        }
        check(result, "VFIO_GROUP_SET_CONTAINER", f"group {self.number}", remedies.get(-result))

    def unset_container(self) -> None:
        """Leave the container, after the group's devices are closed (``VFIO_GROUP_UNSET_CONTAINER``).

        The kernel unmaps everything when the last group leaves. Raises ``OSError``.
        """
        check(lib.vfio_group_unset_container(self.fd), "VFIO_GROUP_UNSET_CONTAINER", f"group {self.number}")

    def get_device_fd(self, name: str, vf_token: uuid.UUID | None = None) -> Device:
        """Open the device at PCI address ``name`` (``VFIO_GROUP_GET_DEVICE_FD``). The kernel resets it if it can.

        ``vf_token``: the VF token (UUID) that a virtual function and its physical function share while the latter is
        bound to vfio-pci, too; the first open of the physical function sets it (vfio_pci_core.c,
        vfio_pci_validate_vf_token). Raises ``OSError``: ``EACCES`` a token is missing or wrong, ``EINVAL`` there is
        one where none is used, ``ENODEV`` no device of this group has that name.
        """
        text = f"{name} vf_token={vf_token}" if vf_token else name
        started = time.monotonic()
        result = lib.vfio_group_get_device_fd(self.fd, text.encode())
        seconds = time.monotonic() - started
        fd = check(result, "VFIO_GROUP_GET_DEVICE_FD", name, token_remedy(-result, vf_token))
        return Device(fd, name, seconds)


def token_remedy(code: int, vf_token: uuid.UUID | None) -> str | None:
    """Return what may help where a device is not opened for want of the right VF token."""
    if code == errno.EACCES:
        return (
            "use the VF token with which the physical function was opened"
            if vf_token
            else "give the virtual function and its physical function one VF token: both are bound to vfio-pci"
        )
    if code == errno.EINVAL and vf_token:
        return "leave out the VF token: it is for SR-IOV functions whose physical function is on vfio-pci"
    return None
