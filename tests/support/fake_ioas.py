"""A second back end, small and made up: mappings in a dict, and the order that an I/O address space wants.

The device is opened, made known to KVM and attached, and only then is memory mapped.
"""

from __future__ import annotations

import errno
import itertools
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvmpass._teardown import run_all
from kvmpass.dma import Mapper
from kvmpass.dma.backend import KvmVfio
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio import DependentDevice
from support.fake_vfio import FakeKernel, refuse


@dataclass
class FakeIoas(FakeKernel):
    """The kernel: what is open, what is attached, what is mapped."""

    devices: dict[str, IoasDevice] = field(default_factory=dict)
    mappings: dict[Range, tuple[int, bool]] = field(default_factory=dict)

    def state(self) -> tuple[Any, ...]:
        """All that a caller can leave behind."""
        devices = {name: (device.attached, device.kvm) for name, device in self.devices.items()}
        return devices, list(self.mappings.items())

    @property
    def files(self) -> set[int]:
        """What KVM is to know."""
        return {device.fd for device in self.devices.values()}

    def file(self, fd: int) -> IoasDevice:
        return next(device for device in self.devices.values() if device.fd == fd)

    def open(self, name: str, group: int, vf_token: uuid.UUID | None) -> IoasDevice:
        def work() -> IoasDevice:
            if name not in self.members.get(group, ()):
                raise refuse(errno.ENODEV, name)
            device = self.devices[name] = IoasDevice(self, name, vf_token)
            return device

        device = self.call("get_device_fd", work)
        assert isinstance(device, IoasDevice)
        return device

    def destroy(self) -> None:
        """The address space goes, and every mapping with it."""
        self.call("destroy", self.mappings.clear)


class IoasDevice:
    """A device that was opened by its own character device."""

    def __init__(self, kernel: FakeIoas, name: str, vf_token: uuid.UUID | None) -> None:
        self.kernel = kernel
        self.name = name
        self.vf_token = vf_token
        self.fd = 200 + [*itertools.chain(*kernel.members.values())].index(name)
        self.kvm: str | None = None
        self.bound = self.attached = False
        self.resets: list[list[int]] = []

    def bind(self) -> None:
        """VFIO_DEVICE_BIND_IOMMUFD: before it the device tells nothing, and can be attached to nothing."""
        self.kernel.call("bind", lambda: setattr(self, "bound", True))

    def attach(self) -> None:
        assert self.bound
        self.kernel.call("attach", lambda: setattr(self, "attached", True))

    def close(self) -> None:
        def work() -> None:
            self.bound = self.attached = False
            self.kernel.devices.pop(self.name, None)

        self.kernel.call("device.close", work)

    def get_pci_hot_reset_info(self) -> list[DependentDevice]:
        assert self.bound
        return self.kernel.dependent[self.name]

    def pci_hot_reset(self, groups: Sequence[Any]) -> None:
        assert not groups, "every device is bound: VFIO knows them without"
        self.resets.append([])


class DictBackend:
    """A ``Backend`` over ``FakeIoas``: all that a back end has to do."""

    def __init__(self, kernel: FakeIoas, mapper: Mapper, kvm_vfio: KvmVfio | None) -> None:
        self._kernel = kernel
        self._mapper = mapper
        self._kvm_vfio = kvm_vfio
        self._devices: list[IoasDevice] = []

    @property
    def active(self) -> bool:
        return bool(self._devices)

    def attach(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Any:
        with ExitStack() as undo:
            device = self._kernel.open(name, group, vf_token)
            self._devices.append(device)
            undo.callback(self.detach, device)
            if self._kvm_vfio:
                self._kvm_vfio.file_add(device.fd)
            device.bind()
            device.attach()
            self._mapper.map_all()
            undo.pop_all()
        return device

    def detach(self, device: Any) -> None:
        """KVM's entry goes first: this fake's descriptors are open for as long as KVM knows them."""
        last = [self._mapper.unmap_all, self._kernel.destroy] if self._devices == [device] else []
        run_all((partial(self._unregister, device), device.close, *last, partial(self._devices.remove, device)))

    def _unregister(self, device: IoasDevice) -> None:
        if self._kvm_vfio:
            with suppress(FileNotFoundError):
                self._kvm_vfio.file_del(device.fd)

    def map(self, region: MemoryRegion) -> None:
        def work() -> None:
            assert any(device.attached for device in self._devices), "mapped earlier nothing is pinned"
            if any(region.range.overlaps(other) for other in self._kernel.mappings):
                raise refuse(errno.EEXIST, "IOMMU_IOAS_MAP")
            self._kernel.mappings[region.range] = (region.hva, region.kind.dma_writable)

        self._kernel.call("map", work)

    def unmap(self, region: MemoryRegion) -> int:
        return int(
            self._kernel.call(
                "unmap", lambda: region.size if self._kernel.mappings.pop(region.range, None) is not None else 0
            )
        )

    def unmap_rest(self) -> int:
        def work() -> int:
            size = sum(range_.size for range_ in self._kernel.mappings)
            self._kernel.mappings.clear()
            return size

        return int(self._kernel.call("unmap_all", work))

    def ranges(self) -> tuple[Range, ...]:
        return self._kernel.ranges

    def hot_reset(self, device: Any, dependent: Sequence[DependentDevice]) -> None:
        device.pci_hot_reset(())

    def rebind_kvm(self, kvm_vfio: KvmVfio | None) -> None:
        for device in self._devices:
            self._unregister(device)
        self._kvm_vfio = kvm_vfio
        for device in self._devices:
            if kvm_vfio:
                kvm_vfio.file_add(device.fd)

    def close(self) -> None: ...
