"""Descriptors that the process has inherited from one that may open the nodes: ``--vfio-fd``, ``--iommu-fd``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from kvmpass._dataclass import dataclass
from kvmpass.errors import BadDescriptor
from kvmpass.host import Bdf, PciDevice, Sysfs
from kvmpass.host.backend import AUTO, BackendChoice
from kvmpass.host.descriptors import identify, passed_devices
from kvmpass.machine.passed import PassedIommu


@dataclass(frozen=True, slots=True)
class PassedDescriptors:
    """Descriptors for one VM, which ``assigned`` owns."""

    iommu: int
    """``/dev/iommu``, or for type 1 ``/dev/vfio/vfio``."""
    vfio: tuple[int, ...]
    """Character devices, or for type 1 groups."""

    def devices(self, sysfs: Sysfs, bdfs: Sequence[Bdf] = ()) -> dict[Bdf, tuple[PciDevice, int]]:
        """Return the devices and their descriptors; ``bdfs``: which of them, where groups have more.

        Raises ``BadDescriptor``, also for a descriptor that is not needed; ``NotAssignable``.
        """
        found: dict[Bdf, tuple[PciDevice, int]] = {}
        for fd in self.vfio:
            own = passed_devices(sysfs, identify(sysfs, fd))
            names = ", ".join(str(device.bdf) for device in own)
            if any(device.bdf in found for device in own):
                raise BadDescriptor(f"two descriptors are of {names}", "pass one for each device or group")
            if bdfs and not any(device.bdf in bdfs for device in own):
                raise BadDescriptor(
                    f"descriptor {fd} is of {names}, which is not among the devices", "leave out the descriptor"
                )
            found.update((device.bdf, (device, fd)) for device in own)
        for bdf in bdfs:
            if bdf not in found:
                raise BadDescriptor(f"no descriptor is of {bdf}", "pass one, or leave out the device")
        return {bdf: found[bdf] for bdf in bdfs or found}

    def check(
        self, sysfs: Sysfs, devices: Mapping[Bdf, tuple[PciDevice, int]], backend: str | None = AUTO
    ) -> BackendChoice:
        """Check that the descriptors fit together and are unused; return the back end. Raises ``BadDescriptor``."""
        with PassedIommu(sysfs, self.iommu, backend) as iommu:
            for bdf, (_, fd) in devices.items():
                iommu.device(fd, bdf)
            return iommu.check_unused().choice

    def close(self) -> None:
        """Close the descriptors, of which the machine has duplicates. Idempotent."""
        for fd in (self.iommu, *self.vfio):
            with suppress(OSError):
                os.close(fd)
