"""VFIO's groups, containers and devices, and KVM's register of groups, made up, with the kernel's rules.

(drivers/vfio/container.c, group.c, vfio_iommu_type1.c, pci/vfio_pci_core.c; virt/kvm/vfio.c.) What a caller must not
do is an assertion here, what the kernel refuses is an ``OSError``.
"""

from __future__ import annotations

import errno
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvmpass.errors import HostNotReady
from kvmpass.layout import PAGE, Range
from kvmpass.memory import HostMapping
from kvmpass.vfio.device import DependentDevice, RegionMapping


class Refused(OSError):
    """What an injected failure raises."""


@dataclass
class FakeKernel:
    """Which devices are in which group. Every call can fail; ``log`` names them."""

    members: dict[int, tuple[str, ...]]
    ranges: tuple[Range, ...] = (Range(0, 0xFEE0_0000), Range(0xFEF0_0000, 1 << 39))
    dependent: dict[str, list[DependentDevice]] = field(default_factory=dict)
    bars: dict[int, FakeBar] = field(default_factory=dict)
    maps_bars: bool = True
    log: list[str] = field(default_factory=list)
    countdown: int = 0
    after: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, number: int, *, after: bool = False) -> None:
        """Let the ``number``-th call from now on fail, once, without doing its work or ``after`` it."""
        self.countdown, self.after = number, after

    def call(self, what: str, work: Callable[[], Any]) -> Any:
        with self.lock:  # devices are opened by several threads
            self.countdown -= 1
            self.log.append(what)
            fails = self.countdown == 0
        if not fails:
            return work()
        if self.after and what != "get_device_fd":  # one that failed has made no descriptor
            work()
        raise Refused(errno.ENOMEM, what)

    def file(self, fd: int) -> Any:
        """What is open there: KVM sets its ``kvm``."""
        raise NotImplementedError

    @property
    def mappings(self) -> dict[Range, tuple[int, bool]]:
        """Of the only address space that there may be: host address and whether it is writable."""
        raise NotImplementedError

    def check_p2p(self) -> None:
        """What a container, or a device, answers when it is asked for peer-to-peer."""
        if not self.maps_bars:
            raise HostNotReady("peer-to-peer is unavailable")

    def peers(self, device: object) -> list[Range]:
        """Where the device's BARs are mapped for DMA."""
        bars = {range_: self.bars.get(hva) for range_, (hva, _) in self.mappings.items()}
        return [range_ for range_, bar in bars.items() if bar is not None and bar.device is device]


class FakeBar(RegionMapping):
    """Part of a device's BAR in this process. The kernel recognises it by its address."""

    def __init__(self, kernel: FakeKernel, device: Any, index: int, area: Range) -> None:
        HostMapping.__init__(self, area.size)
        self.device = device
        self.index = index
        self.area = area
        kernel.bars[self.address] = self


@dataclass
class FakeVfio(FakeKernel):
    """VFIO's groups and containers: what is open, what is mapped."""

    groups: dict[int, FakeGroup] = field(default_factory=dict)
    containers: list[FakeContainer] = field(default_factory=list)
    removed: bool = False

    def state(self) -> tuple[Any, ...]:
        """All that a caller can leave behind."""
        return (
            {
                number: (sorted(device.name for device in group.devices), group.container is not None, group.kvm)
                for number, group in self.groups.items()
            },
            [(container.iommu, dict(container.mappings)) for container in self.containers],
        )

    @property
    def mappings(self) -> dict[Range, tuple[int, bool]]:
        """Of the only container that there may be: host address and whether it is writable."""
        assert len(self.containers) <= 1
        return self.containers[0].mappings if self.containers else {}

    @property
    def files(self) -> set[int]:
        """What KVM is to know."""
        return {group.fd for group in self.groups.values()}

    def file(self, fd: int) -> FakeGroup:
        group = next((group for group in self.groups.values() if group.fd == fd), None)
        assert group is not None, "the descriptor is open"
        return group

    # --- what a back end makes

    def container(self) -> FakeContainer:
        container = FakeContainer(self)
        self.containers.append(container)
        return container

    def group(self, number: int) -> FakeGroup:
        if number not in self.members:
            raise FileNotFoundError(errno.ENOENT, f"/dev/vfio/{number}")
        if number in self.groups:
            raise OSError(errno.EBUSY, f"/dev/vfio/{number}")
        group = self.groups[number] = FakeGroup(self, number)
        return group


def refuse(code: int, what: str) -> OSError:
    return OSError(code, what)


class FakeContainer:
    def __init__(self, kernel: FakeVfio) -> None:
        self.kernel = kernel
        self.groups: list[FakeGroup] = []
        self.iommu = self.closed = False
        self.mappings: dict[Range, tuple[int, bool]] = {}

    def check_p2p(self) -> None:
        assert not self.groups
        self.kernel.check_p2p()

    def set_iommu(self) -> None:
        def work() -> None:
            if self.iommu or not self.groups:
                raise refuse(errno.EINVAL, "VFIO_SET_IOMMU")
            self.iommu = True

        self.kernel.call("set_iommu", work)

    def iova_ranges(self) -> tuple[Range, ...]:
        if not self.iommu:
            raise refuse(errno.EINVAL, "VFIO_IOMMU_GET_INFO")
        return self.kernel.ranges

    def map_dma(self, iova: int, hva: int, size: int, *, writable: bool) -> None:
        def work() -> None:
            wanted = Range(iova, size)
            if not self.iommu or not size or (iova | hva | size) % PAGE:
                raise refuse(errno.EINVAL, "VFIO_IOMMU_MAP_DMA")
            if any(wanted.overlaps(other) for other in self.mappings):
                raise refuse(errno.EEXIST, "VFIO_IOMMU_MAP_DMA")
            if (bar := self.kernel.bars.get(hva)) and not bar.device.memory:  # type: ignore[attr-defined]
                raise refuse(errno.EFAULT, "VFIO_IOMMU_MAP_DMA")
            self.mappings[wanted] = (hva, writable)

        self.kernel.call("map", work)

    def unmap_dma(self, iova: int, size: int) -> int:
        def work() -> int:
            if not self.iommu or not size:
                raise refuse(errno.EINVAL, "VFIO_IOMMU_UNMAP_DMA")
            inside = [mapping for mapping in self.mappings if Range(iova, size).contains(mapping)]
            return sum(self.mappings.pop(mapping) and mapping.size for mapping in inside)

        return int(self.kernel.call("unmap", work))

    def unmap_all(self) -> int:
        def work() -> int:
            if not self.iommu:
                raise refuse(errno.EINVAL, "VFIO_IOMMU_UNMAP_DMA")
            size = sum(mapping.size for mapping in self.mappings)
            self.mappings.clear()
            return size

        return int(self.kernel.call("unmap_all", work))

    def close(self) -> None:
        def work() -> None:
            self.closed = True
            self.release()

        self.kernel.call("container.close", work)

    def release(self) -> None:
        """A group keeps its container alive, without a descriptor too."""
        if self.closed and not self.groups and self in self.kernel.containers:
            self.kernel.containers.remove(self)


class FakeGroup:
    def __init__(self, kernel: FakeVfio, number: int) -> None:
        self.kernel = kernel
        self.number = number
        self.fd = 100 + number
        self.container: FakeContainer | None = None
        self.devices: list[FakeDevice] = []
        self.kvm: str | None = None

    @property
    def removed(self) -> bool:
        return self.kernel.removed

    def set_container(self, container: FakeContainer) -> None:
        def work() -> None:
            if self.container is not None:
                raise refuse(errno.EINVAL, "VFIO_GROUP_SET_CONTAINER")
            self.container = container
            container.groups.append(self)

        self.kernel.call("set_container", work)

    def unset_container(self) -> None:
        def work() -> None:
            if self.container is None:
                raise refuse(errno.EINVAL, "VFIO_GROUP_UNSET_CONTAINER")
            if self.devices:
                raise refuse(errno.EBUSY, "VFIO_GROUP_UNSET_CONTAINER")
            self._leave()

        self.kernel.call("unset_container", work)

    def _leave(self) -> None:
        container, self.container = self.container, None
        if container is not None:
            container.groups.remove(self)
            if not container.groups:  # the IOMMU goes with the last group, and every mapping with it
                container.iommu = False
                container.mappings.clear()
            container.release()

    def get_device_fd(self, name: str, vf_token: uuid.UUID | None = None) -> FakeDevice:
        def work() -> FakeDevice:
            if self.container is None or not self.container.iommu:
                raise refuse(errno.EINVAL, "VFIO_GROUP_GET_DEVICE_FD")
            if name not in self.kernel.members[self.number]:
                raise refuse(errno.ENODEV, "VFIO_GROUP_GET_DEVICE_FD")
            device = FakeDevice(self, name, vf_token)
            self.devices.append(device)
            return device

        device = self.kernel.call("get_device_fd", work)
        assert isinstance(device, FakeDevice)
        return device

    def close(self) -> None:
        def work() -> None:
            assert not self.devices, "a group with open devices is not closed"
            self._leave()
            self.kvm = None
            self.kernel.groups.pop(self.number, None)

        self.kernel.call("group.close", work)


class FakeDevice:
    """``vm``: who was registered for its group when it was opened."""

    def __init__(self, group: FakeGroup, name: str, vf_token: uuid.UUID | None) -> None:
        self.group = group
        self.name = name
        self.vf_token = vf_token
        self.vm = group.kvm
        self.memory = True  # decoded
        self.resets: list[list[int]] = []

    def close(self) -> None:
        """Type 1 keeps the mappings of its BARs: others would reach what has these addresses next."""

        def work() -> None:
            assert not self.group.kernel.peers(self)
            if self in self.group.devices:
                self.group.devices.remove(self)

        self.group.kernel.call("device.close", work)

    def get_pci_hot_reset_info(self) -> list[DependentDevice]:
        return self.group.kernel.dependent[self.name]

    def pci_hot_reset(self, groups: list[FakeGroup]) -> None:
        dependent = self.get_pci_hot_reset_info()
        given = {group.number for group in groups}
        if len(groups) > len(dependent) or any(device.group not in given for device in dependent):
            raise refuse(errno.EINVAL, "VFIO_DEVICE_PCI_HOT_RESET")
        assert not self.group.kernel.peers(self)
        self.resets.append(sorted(given))


class FakeKvmVfio:
    """KVM's register of VFIO files of the VM called ``name``."""

    def __init__(self, kernel: FakeKernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.files: set[int] = set()

    def file_add(self, fd: int) -> None:
        def work() -> None:
            if fd in self.files:
                raise refuse(errno.EEXIST, "KVM_DEV_VFIO_FILE_ADD")
            self.kernel.file(fd).kvm = self.name
            self.files.add(fd)

        self.kernel.call("file_add", work)

    def file_del(self, fd: int) -> None:
        """The group has no VM afterwards, regardless of its owner (kvm_vfio_file_del)."""

        def work() -> None:
            if fd not in self.files:
                raise refuse(errno.ENOENT, "KVM_DEV_VFIO_FILE_DEL")
            self.kernel.file(fd).kvm = None
            self.files.remove(fd)

        self.kernel.call("file_del", work)
