"""A VFIO device that is opened by its own character device (drivers/vfio/device_cdev.c), for an iommufd."""

from __future__ import annotations

import errno
import time
import uuid
from pathlib import Path

from kvmpass._fd import OwnedFd, check, open_node
from kvmpass._native import ffi, lib
from kvmpass._teardown import undo_on_error
from kvmpass.errors import BadDescriptor, NotAssignable
from kvmpass.vfio.device import Device
from kvmpass.vfio.group import token_remedy

_PCI_DEVICES = "/sys/bus/pci/devices"
_UNTRANSLATED = "noiommu-"  # begins the names of devices without an IOMMU

_BIND_REMEDY = {
    errno.EPERM: "bind all devices of its IOMMU group to vfio-pci, and end the processes that use one (the group's "
    "DMA has another owner); or enable interrupt remapping in the firmware, without which assignment is not safe",
    errno.EBUSY: "end the process that has the node of its IOMMU group open (/dev/vfio/GROUP)",
    errno.EINVAL: "end the process that has the device open; or turn off pre-boot DMA protection in the firmware, "
    "which requires a direct-mapped region for it (IVRS IVMD)",
}
_TOKEN_UNKNOWN = (
    "use the type 1 back end (character devices take VF tokens since Linux 6.17), or leave out the VF token"
)
_ATTACH_REMEDY = {
    errno.EADDRINUSE: "keep guest memory out of the reserved regions of its IOMMU group",
    errno.ENOMEM: "raise the memlock limit (ulimit -l), which iommufd counts for each user over all processes, or "
    "run with CAP_IPC_LOCK; or free memory",
}


class Cdev(Device):
    """One function, opened by ``/dev/vfio/devices/vfioN``. Most attributes of a ``Device`` exist once it is bound.

    ``name`` is its PCI address. ``fd``: its node that is open already and not bound, which the object then owns.
    Raises ``OSError`` (``ENOENT``: it is not bound to vfio-pci, or the kernel has no such nodes), ``NotAssignable``
    for a device without an IOMMU, and ``BadDescriptor`` for an open one that is bound.
    """

    def __init__(
        self, name: str, devices: str = _PCI_DEVICES, nodes: str = "/dev/vfio/devices", *, fd: int | None = None
    ) -> None:
        OwnedFd.__init__(self, open_node(f"{nodes}/{node_name(name, devices)}") if fd is None else fd)
        self.name = name
        self.open_seconds = self.close_seconds = 0.0
        self._passed = fd is not None
        if self._passed:
            with undo_on_error(self.close):
                self._check_unbound()

    def _check_unbound(self) -> None:
        """Only a bound device answers (vfio_device_fops_unl_ioctl, drivers/vfio/vfio_main.c)."""
        if lib.vfio_device_get_info(self.fd, ffi.new("struct kvmpass_device_info *")) >= 0:
            raise BadDescriptor(
                f"the open file of {self.name} is bound to an iommufd already",
                "open its node again (/dev/vfio/devices/vfioN), and leave VFIO_DEVICE_BIND_IOMMUFD to the VM",
            )

    def bind(self, iommufd: int, vf_token: uuid.UUID | None = None) -> int:
        """Bind the device to an iommufd until it is closed (``VFIO_DEVICE_BIND_IOMMUFD``); return its device ID.

        The kernel resets it if it can. Register it with KVM before (``KVM_DEV_VFIO_FILE_ADD``). ``vf_token``: see
        ``Group.get_device_fd``. Raises ``OSError``: ``EPERM`` its DMA has another owner, or there is no interrupt
        remapping; ``EBUSY`` its group is open; ``EINVAL`` it is open already; ``EACCES`` a token is missing or wrong.
        """
        devid = ffi.new("uint32_t *")
        token = vf_token.bytes if vf_token else ffi.NULL
        started = time.monotonic()
        result = lib.vfio_device_bind_iommufd(self.fd, iommufd, token, devid)
        self.open_seconds = time.monotonic() - started
        if result == -errno.EINVAL and vf_token:
            remedy: str | None = _TOKEN_UNKNOWN
        else:
            remedy = token_remedy(-result, vf_token) or _BIND_REMEDY.get(-result)
        check(result, "VFIO_DEVICE_BIND_IOMMUFD", self.name, remedy)
        self._read_info()
        return int(devid[0])

    def attach(self, ioas: int) -> None:
        """Attach the device to an IOAS (or a HWPT), instead of an earlier one (``VFIO_DEVICE_ATTACH_IOMMUFD_PT``).

        Its DMA reaches what is mapped in the IOAS. Raises ``OSError``: ``EADDRINUSE`` a mapping has an address
        that it cannot use; ``EINVAL`` its IOMMU group is attached to another IOAS; ``ENOMEM`` over the memlock limit.
        """
        result = lib.vfio_device_attach_iommufd_pt(self.fd, ioas)
        check(result, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", self.name, _ATTACH_REMEDY.get(-result))

    def detach(self) -> None:
        """Block its DMA, although others may have it open (``VFIO_DEVICE_DETACH_IOMMUFD_PT``). Idempotent.

        Raises ``OSError`` (``EINVAL``: it is not bound).
        """
        check(lib.vfio_device_detach_iommufd_pt(self.fd), "VFIO_DEVICE_DETACH_IOMMUFD_PT", self.name)

    @property
    def resets_at_close(self) -> bool:
        """See ``Device``. The kernel resets it when the last duplicate of a passed descriptor is closed."""
        return super().resets_at_close and not self._passed


def node_name(name: str, devices: str = _PCI_DEVICES) -> str:
    """Return the name of its node below /dev/vfio/devices. Raises ``FileNotFoundError``, ``NotAssignable``."""
    directory = Path(devices, name, "vfio-dev")
    try:
        (node,) = (path.name for path in directory.iterdir())
    except (OSError, ValueError):
        raise FileNotFoundError(errno.ENOENT, f"{name} has no VFIO device", str(directory)) from None
    if node.startswith(_UNTRANSLATED):
        raise NotAssignable(
            f"{name} is {node} for VFIO, which has no IOMMU: its DMA would not be translated",
            "disable enable_unsafe_noiommu_mode of vfio and turn on the IOMMU (AMD-Vi)",
        )
    return node
