"""iommufd and VFIO's character devices, made up, with the kernel's rules.

(drivers/iommu/iommufd/ioas.c, device.c; drivers/vfio/device_cdev.c; virt/kvm/vfio.c.) What a caller must not do is an
assertion here, what the kernel refuses is an ``OSError``.
"""

from __future__ import annotations

import errno
import itertools
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmpass.iommufd import IovaRanges
from kvmpass.layout import PAGE, Range
from kvmpass.vfio import DependentDevice
from support.fake_vfio import FakeBar, FakeKernel, refuse


@dataclass
class FakeIoas(FakeKernel):
    """The kernel: what is open, what is attached, what is mapped."""

    devices: dict[str, FakeCdev] = field(default_factory=dict)
    contexts: list[FakeIommufd] = field(default_factory=list)
    dma_bufs: dict[int, FakeDmaBuf] = field(default_factory=dict)

    def state(self) -> tuple[Any, ...]:
        """All that a caller can leave behind."""
        devices = {name: (device.ioas, device.kvm) for name, device in self.devices.items()}
        return devices, [(number, dict(one)) for context in self.contexts for number, one in context.spaces.items()]

    @property
    def mappings(self) -> dict[Range, tuple[int, bool]]:
        """Of the only IOAS that there may be: host address and whether it is writable."""
        spaces = [space for context in self.contexts for space in context.spaces.values()]
        assert len(spaces) <= 1
        return spaces[0] if spaces else {}

    @property
    def files(self) -> set[int]:
        """What KVM is to know."""
        return {device.fd for device in self.devices.values()}

    def file(self, fd: int) -> FakeCdev:
        found = next((device for device in self.devices.values() if device.fd == fd), None)
        assert found is not None, "the descriptor is open"
        return found

    # --- what a back end makes

    def cdev(self, name: str) -> FakeCdev:
        if name not in itertools.chain(*self.members.values()):
            raise FileNotFoundError(errno.ENOENT, f"{name} has no VFIO device")
        device = self.devices[name] = FakeCdev(self, name)
        return device

    def iommufd(self) -> FakeIommufd:
        context = FakeIommufd(self)
        self.contexts.append(context)
        return context


class FakeIommufd:
    """An open /dev/iommu: its address spaces by number."""

    def __init__(self, kernel: FakeIoas) -> None:
        self.kernel = kernel
        self.fd = 300 + len(kernel.contexts)
        self.spaces: dict[int, dict[Range, tuple[int, bool]]] = {}
        self.closed = False

    def attached(self, ioas: int) -> bool:
        return any(device.ioas == ioas for device in self.kernel.devices.values() if device.bound is self)

    def ioas_alloc(self) -> int:
        def work() -> int:
            self.spaces[7] = {}
            return 7

        return int(self.kernel.call("ioas_alloc", work))

    def destroy(self, number: int) -> None:
        def work() -> None:
            if number not in self.spaces:
                raise refuse(errno.ENOENT, "IOMMU_DESTROY")
            if self.attached(number):
                raise refuse(errno.EBUSY, "IOMMU_DESTROY")
            del self.spaces[number]

        self.kernel.call("destroy", work)

    def ioas_iova_ranges(self, ioas: int) -> IovaRanges:
        assert self.attached(ioas), "before a device is attached everything is allowed"
        return IovaRanges(self.kernel.ranges, PAGE)

    def ioas_map(self, ioas: int, iova: int, hva: int, size: int, *, writable: bool) -> None:
        def work() -> None:
            assert self.attached(ioas), "mapped earlier nothing is pinned"
            wanted = Range(iova, size)
            if not size or (iova | hva | size) % PAGE:
                raise refuse(errno.EINVAL, "IOMMU_IOAS_MAP")
            if any(wanted.overlaps(other) for other in self.spaces[ioas]):
                raise refuse(errno.EEXIST, "IOMMU_IOAS_MAP")
            if hva in self.kernel.bars:
                raise refuse(errno.EFAULT, "IOMMU_IOAS_MAP")
            self.spaces[ioas][wanted] = (hva, writable)

        self.kernel.call("map", work)

    def ioas_map_file(self, ioas: int, iova: int, fd: int, offset: int, size: int, *, writable: bool) -> None:
        def work() -> None:
            buffer, wanted = self.kernel.dma_bufs[os.fstat(fd).st_ino], Range(iova, size)
            if offset or size != buffer.bar.area.size or iova % PAGE:
                raise refuse(errno.EINVAL, "IOMMU_IOAS_MAP_FILE")
            if any(wanted.overlaps(other) for other in self.spaces[ioas]):
                raise refuse(errno.EEXIST, "IOMMU_IOAS_MAP_FILE")
            if buffer.revoked:
                raise refuse(errno.ENODEV, "IOMMU_IOAS_MAP_FILE")
            buffer.mapped = True
            self.spaces[ioas][wanted] = (buffer.bar.address, writable)

        self.kernel.call("map", work)

    def ioas_unmap(self, ioas: int, iova: int, size: int) -> int:
        def work() -> int:
            inside = [mapping for mapping in self.spaces[ioas] if Range(iova, size).contains(mapping)]
            if not inside:
                raise refuse(errno.ENOENT, "IOMMU_IOAS_UNMAP")
            return sum(self.spaces[ioas].pop(mapping) and mapping.size for mapping in inside)

        return int(self.kernel.call("unmap", work))

    def ioas_unmap_all(self, ioas: int) -> int:
        def work() -> int:
            size = sum(mapping.size for mapping in self.spaces[ioas])
            self.spaces[ioas].clear()
            return size

        return int(self.kernel.call("unmap_all", work))

    def close(self) -> None:
        def work() -> None:
            self.closed = True
            self.release()

        self.kernel.call("iommufd.close", work)

    def release(self) -> None:
        """A bound device keeps the context alive, without a descriptor too."""
        if self.closed and not any(device.bound is self for device in self.kernel.devices.values()):
            self.spaces.clear()
            if self in self.kernel.contexts:
                self.kernel.contexts.remove(self)


@dataclass
class FakeDmaBuf:
    """Of part of a BAR. What is mapped of it when it is revoked stays an area without pages: it reaches nothing."""

    bar: FakeBar
    revoked: bool
    mapped: bool = False
    lost: bool = False

    def revoke(self, revoked: bool) -> None:
        self.revoked = revoked
        self.lost |= revoked and self.mapped


class FakeCdev:
    """A device that was opened by its own character device. ``vm``: who was registered when it was bound."""

    def __init__(self, kernel: FakeIoas, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.fd = 200 + [*itertools.chain(*kernel.members.values())].index(name)
        self.vf_token: uuid.UUID | None = None
        self.vm: str | None = None
        self.bound: FakeIommufd | None = None
        self.ioas: int | None = None
        self.closed = False
        self.resets: list[list[int]] = []
        self.memory = True  # decoded
        self._kvm: str | None = None

    @property
    def kvm(self) -> str | None:
        """The VM that knows the file."""
        return self._kvm

    @kvm.setter
    def kvm(self, name: str | None) -> None:
        self._kvm = name
        self._release()

    def bind(self, iommufd: int, vf_token: uuid.UUID | None = None) -> int:
        """Before it the device says nothing, and can be attached to nothing."""

        def work() -> int:
            if self.bound is not None:
                raise refuse(errno.EINVAL, "VFIO_DEVICE_BIND_IOMMUFD")
            self.bound = next(context for context in self.kernel.contexts if context.fd == iommufd)
            self.vm, self.vf_token = self.kvm, vf_token
            return 1

        return int(self.kernel.call("bind", work))

    def check_p2p(self) -> None:
        assert self.bound is not None
        self.kernel.check_p2p()

    def export_dma_buf(self, bar: int, offset: int, size: int) -> int:
        """A descriptor, which the caller closes. While memory is not decoded what it exports is revoked already."""

        def work() -> int:
            bars = [found for found in self.kernel.bars.values() if found.device is self and found.index == bar]
            part = next(found for found in reversed(bars) if found.area.contains(Range(offset, size)))
            fd = os.memfd_create("dma-buf")
            self.kernel.dma_bufs[os.fstat(fd).st_ino] = FakeDmaBuf(part, revoked=not self.memory)
            return fd

        return int(self.kernel.call("export", work))

    def revoke(self) -> None:
        """As the kernel does before a reset, and before the device is closed: without a word to the process."""
        for buffer in self.kernel.dma_bufs.values():
            if buffer.bar.device is self:
                buffer.revoke(True)

    def attach(self, ioas: int) -> None:
        def work() -> None:
            assert self.bound is not None
            if ioas not in self.bound.spaces:
                raise refuse(errno.ENOENT, "VFIO_DEVICE_ATTACH_IOMMUFD_PT")
            self.ioas = ioas

        self.kernel.call("attach", work)

    def detach(self) -> None:
        def work() -> None:
            assert self.bound is not None
            self.ioas = None

        self.kernel.call("detach", work)

    def close(self) -> None:
        def work() -> None:
            assert not self.kernel.peers(self), "others would have an area of the address space that reaches nothing"
            self.closed = True
            self._release()

        self.kernel.call("device.close", work)

    def _release(self) -> None:
        """KVM keeps the file open that it knows."""
        if self.closed and self._kvm is None and self.kernel.devices.get(self.name) is self:
            context, self.bound, self.ioas = self.bound, None, None
            del self.kernel.devices[self.name]
            if context is not None:
                context.release()

    def get_pci_hot_reset_info(self) -> list[DependentDevice]:
        assert self.bound
        return self.kernel.dependent[self.name]

    def pci_hot_reset(self, groups: Sequence[Any]) -> None:
        assert not groups, "every device is bound: VFIO knows them without"
        assert not self.kernel.peers(self), "it is revoked, and stays so"
        self.resets.append([])
