"""Descriptors that another process has opened for a machine: one of the IOMMU's, and those of devices or groups."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from kvmpass._fd import OwnedFd
from kvmpass.dma import Backend, IommufdBackend, Mapper, Type1
from kvmpass.errors import BadDescriptor
from kvmpass.host import Bdf, PciDevice, Sysfs
from kvmpass.host.backend import AUTO, IOMMUFD, PASSED, TYPE1, BackendChoice
from kvmpass.host.descriptors import Kind, identify, passed_devices
from kvmpass.iommufd import Iommufd
from kvmpass.machine.device import BoundDevice
from kvmpass.vfio import Cdev, Container, Group

_OF_DEVICES = {Kind.IOMMUFD: Kind.DEVICE, Kind.CONTAINER: Kind.GROUP}


def duplicate(fd: int) -> int:
    """Duplicate a descriptor, close-on-exec. Raises ``OSError``."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


class PassedIommu(OwnedFd):
    """A duplicate of a descriptor of ``/dev/iommu`` or ``/dev/vfio/vfio``, and the back end over it.

    The back end opens no node: devices come by descriptors (``offer``).
    ``wanted``: one of ``BACKENDS``, or None for a factory, which has no place here.
    Raises ``BadDescriptor``: another kind, or one that is in use; ``OSError``, ``ValueError``.

    Synchronization: callers hold the machine's device lock.
    """

    def __init__(self, sysfs: Sysfs, fd: int, wanted: str | None = AUTO) -> None:
        if wanted is None:
            raise ValueError("iommu_fd determines the back end")
        self._sysfs = sysfs
        self._found = identify(sysfs, fd)
        if self._found.kind not in _OF_DEVICES:
            raise BadDescriptor(
                f"{self._found}, not an interface of the IOMMU",
                "open /dev/iommu, or /dev/vfio/vfio for type 1, and pass that",
            )
        name = IOMMUFD if self._found.kind is Kind.IOMMUFD else TYPE1
        if wanted not in (AUTO, name):
            raise BadDescriptor(f"{self._found}: the back end is {name}, not {wanted}", "leave out the back end")
        self.choice = BackendChoice(name, PASSED)
        """The back end, by the kind of descriptor."""
        super().__init__(duplicate(fd))
        self._offered: dict[str | int | None, int] = {}  # by address, and by group

    def check_unused(self) -> Self:
        """Raise ``BadDescriptor`` if it has devices, groups or mappings already; else return this object."""
        with self._iommufd() if self.choice.name == IOMMUFD else self._container() as context:
            context.check_unused()
        return self

    def __call__(self, mapper: Mapper) -> Backend:
        """Construct the back end: a ``BackendFactory``."""
        if self.choice.name == IOMMUFD:
            return IommufdBackend(mapper, iommufd=self._iommufd, cdev=self._cdev)
        return Type1(mapper, container=self._container, group=self._group)

    def device(self, fd: int, bdf: Bdf | None) -> PciDevice:
        """Return the device to open by ``fd``; ``bdf``: which, where a group has several.

        Raises ``BadDescriptor``, ``NotAssignable``.
        """
        descriptor = identify(self._sysfs, fd)
        wanted = _OF_DEVICES[self._found.kind]
        if descriptor.kind is not wanted:
            raise BadDescriptor(
                f"{descriptor}, and the IOMMU's descriptor is {self._found.kind.value}",
                f"pass {wanted.value} with {self._found.kind.value}",
            )
        found = passed_devices(self._sysfs, descriptor)
        chosen = [device for device in found if bdf in (None, device.bdf)]
        names = ", ".join(str(device.bdf) for device in found)
        if not chosen:
            raise BadDescriptor(f"descriptor {fd} is of {names}, not of {bdf}", "pass the descriptor of that device")
        if len(chosen) > 1:
            raise BadDescriptor(f"descriptor {fd} is of a group with {names}", "name the device")
        return chosen[0]

    @contextmanager
    def offer(self, devices: Iterable[BoundDevice], fds: Mapping[Bdf, int]) -> Iterator[None]:
        """Let the back end open the devices, or their groups, by ``fds`` while the block runs."""
        for device in devices:
            self._offered[str(device.bdf)] = self._offered[device.group] = fds[device.bdf]
        try:
            yield
        finally:
            self._offered.clear()

    def _iommufd(self) -> Iommufd:
        return Iommufd(fd=duplicate(self.fd))

    def _container(self) -> Container:
        return Container(fd=duplicate(self.fd))

    def _cdev(self, name: str) -> Cdev:
        return Cdev(name, fd=duplicate(self._offered[name]))

    def _group(self, number: int) -> Group:
        return Group(number, fd=duplicate(self._offered[number]))
