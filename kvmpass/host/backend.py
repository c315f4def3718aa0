"""The kernel's interfaces to the IOMMU, iommufd and VFIO's type 1: which of them a machine uses, and why."""

from __future__ import annotations

from collections.abc import Iterable

from kvmpass._dataclass import dataclass
from kvmpass.host.address import Bdf
from kvmpass.host.kernel.modules import module
from kvmpass.host.kernel.permissions import may
from kvmpass.host.sysfs import PCI_DEVICES, PCI_DRIVERS, VFIO_PCI, Sysfs

AUTO, IOMMUFD, TYPE1 = BACKENDS = ("auto", "iommufd", "type1")
PASSED = "its descriptor was passed"
"""Why a back end is used that another process has opened."""

IOMMU_NODE = "dev/iommu"
CDEVS = "dev/vfio/devices"
TYPE1_MODULE = "vfio_iommu_type1"
_TAKES_VF_TOKEN = (6, 17)  # VFIO_DEVICE_BIND_FLAG_TOKEN
_MAPS_BARS = (6, 19)  # VFIO_DEVICE_FEATURE_DMA_BUF


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What ``auto`` comes to, or what was asked for."""

    name: str
    """``iommufd`` or ``type1``."""
    reason: str
    """Why: one clause."""
    obstacle: str = ""
    """Why the kernel cannot do what was asked for; empty if it can."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def cdevs(sysfs: Sysfs, bdf: Bdf) -> list[str]:
    """Return the VFIO character device of a device that is bound to vfio-pci, as a path without a leading slash.

    There is none before Linux 6.6, and without CONFIG_VFIO_DEVICE_CDEV.
    """
    return [f"{CDEVS}/{name}" for name in sysfs.names(PCI_DEVICES, str(bdf), "vfio-dev")]


def check_backend(wanted: str) -> None:
    """Raise ``ValueError`` unless ``wanted`` is one of ``BACKENDS``."""
    if wanted not in BACKENDS:
        raise ValueError(f"no IOMMU back end {wanted!r}: {', '.join(BACKENDS)}")


def choose_backend(
    sysfs: Sysfs, bdfs: Iterable[Bdf] = (), wanted: str = AUTO, *, vf_token: bool = False, p2p: bool = False
) -> BackendChoice:
    """Return what a machine with these devices uses: iommufd where the kernel has it and this user may.

    ``wanted`` is one of ``BACKENDS``. A device says more once it is bound to vfio-pci. ``vf_token``: whether devices
    are opened with one; ``p2p``: whether they reach each other's BARs. Only reads. Raises ``ValueError``.
    """
    check_backend(wanted)
    if wanted == TYPE1:
        return BackendChoice(TYPE1, "requested")
    bdfs = list(bdfs)
    obstacle = _kernel_lacks(sysfs, bdfs, vf_token, p2p)
    if wanted == IOMMUFD:
        return BackendChoice(IOMMUFD, "requested", obstacle)
    denied = obstacle or _denied(sysfs, bdfs)
    if not denied:
        return BackendChoice(IOMMUFD, "available to this user")
    if not obstacle and not module(sysfs, TYPE1_MODULE).usable:
        return BackendChoice(IOMMUFD, "this kernel has no type 1")
    return BackendChoice(TYPE1, denied)


def _kernel_lacks(sysfs: Sysfs, bdfs: list[Bdf], vf_token: bool, p2p: bool) -> str:
    """Return what the kernel lacks for iommufd; empty if nothing."""
    loaded = sysfs.exists(PCI_DRIVERS, VFIO_PCI)
    # vfio loads iommufd, where that is a module.
    if not sysfs.exists(IOMMU_NODE) and (loaded or not module(sysfs, "iommufd").usable):
        return f"this kernel has no /{IOMMU_NODE}"
    drivers = sysfs.text("proc/devices") if loaded else None
    names = {line.split()[-1] for line in (drivers or "").splitlines() if line}
    without = [bdf for bdf in bdfs if sysfs.driver(bdf) == VFIO_PCI and not cdevs(sysfs, bdf)]
    if without or (drivers is not None and "vfio-dev" not in names):
        return "this kernel's VFIO has no character devices"
    if vf_token and sysfs.kernel() < _TAKES_VF_TOKEN:
        return "VFIO's character devices take VF tokens since Linux 6.17"
    if p2p and sysfs.kernel() < _MAPS_BARS:
        version = ".".join(map(str, sysfs.kernel()))
        return f"iommufd maps BARs for peer-to-peer since Linux 6.19; this is Linux {version}"
    return ""


def _denied(sysfs: Sysfs, bdfs: list[Bdf]) -> str:
    """Return what this user may not open; empty if nothing is denied that exists."""
    nodes = [IOMMU_NODE, *(node for bdf in bdfs for node in cdevs(sysfs, bdf))]
    denied = [f"/{node}" for node in nodes if sysfs.exists(node) and not may(sysfs, node)]
    return f"this user may not open {', '.join(denied)}" if denied else ""
