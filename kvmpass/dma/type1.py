"""VFIO's type 1 container as a back end: IOMMU groups join it, and memory is mapped in it.

Its order: open the group → join the container → make it an IOMMU (the first group) → map all memory → tell KVM of the
group → open the device. There is an IOMMU only while a group is in the container; the last one takes every mapping
with it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from kvmpass._teardown import run_all
from kvmpass.dma.backend import KvmVfio, Mapper
from kvmpass.errors import AuditFailed
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio import Container, DependentDevice, Device, Group


@dataclass(slots=True)
class _Joined:
    """A group in the container, and its devices that are open."""

    group: Group
    devices: list[Device] = field(default_factory=list)


class Type1:
    """A ``Backend``: one container, made for the first group and closed after the last."""

    def __init__(self, mapper: Mapper, kvm_vfio: KvmVfio | None = None) -> None:
        self._mapper = mapper
        self._kvm_vfio = kvm_vfio
        self._container: Container | None = None
        self._groups: dict[int, _Joined] = {}

    @property
    def active(self) -> bool:
        """Whether a group is in the container."""
        return bool(self._groups)

    def attach(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Device:
        """The first device of a group lets it join, and only the first group maps."""
        with ExitStack() as undo:
            if group not in self._groups or not self._groups[group].devices:
                joined = self._join(group)
                undo.callback(self._leave, group)
                self._mapper.map_all()
                self._register(joined.group)
            joined = self._groups[group]
            device = joined.group.get_device_fd(name, vf_token)
            joined.devices.append(device)
            undo.pop_all()
        return device

    def detach(self, device: Device) -> None:
        """The group leaves with its last device. One that cannot stays recorded."""
        number, devices = next((n, one.devices) for n, one in self._groups.items() if device in one.devices)
        steps: list[Callable[[], object]] = [device.close, partial(devices.remove, device)]
        if len(devices) == 1:
            steps.append(partial(self._leave, number))
        run_all(steps)

    def _join(self, number: int) -> _Joined:
        if number in self._groups:  # it could not leave before
            self._leave(number)
        with ExitStack() as undo:
            group = Group(number)
            undo.callback(group.close)
            if self._container is None:
                self._container = Container()
                undo.callback(self._close_container)
            group.set_container(self._container)
            undo.callback(group.unset_container)
            if not self._groups:
                self._container.set_iommu()
            joined = self._groups[number] = _Joined(group)
            undo.pop_all()
        return joined

    def _leave(self, number: int) -> None:
        group, last = self._groups[number].group, len(self._groups) == 1

        def leave_container() -> None:
            self._unless_taken(group, group.unset_container)
            del self._groups[number]
            run_all((group.close, *([self._close_container] if last else [])))

        unmap = [partial(self._unless_taken, group, self._mapper.unmap_all)] if last else []
        run_all((partial(self._unregister, group), *unmap, leave_container))

    @staticmethod
    def _unless_taken(group: Group, step: Callable[[], None]) -> None:
        """Do ``step``; it may fail where the host has taken the group, and all mappings with it.

        It does when somebody unbinds the device and waited for us to close it (vfio_device_remove_group).
        """
        try:
            step()
        except (OSError, AuditFailed):
            if not group.taken:
                raise

    def _close_container(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def close(self) -> None:
        """Let the groups leave that could not before."""
        run_all(partial(self._leave, number) for number in list(self._groups))

    # --- KVM

    def _register(self, group: Group) -> None:
        if self._kvm_vfio:
            self._kvm_vfio.file_add(group.fd)

    def _unregister(self, group: Group) -> None:
        """Whether KVM has the group or not."""
        if self._kvm_vfio:
            with suppress(FileNotFoundError):
                self._kvm_vfio.file_del(group.fd)

    def rebind_kvm(self, kvm_vfio: KvmVfio | None) -> None:
        """The other way round VFIO would take the group from whoever has it (kvm_vfio_file_del, virt/kvm/vfio.c)."""
        for joined in self._groups.values():
            self._unregister(joined.group)
        self._kvm_vfio = kvm_vfio
        for joined in self._groups.values():
            self._register(joined.group)

    # --- mappings

    @property
    def container(self) -> Container:
        """There is one only while ``active``."""
        assert self._container is not None
        return self._container

    def map(self, region: MemoryRegion) -> None:
        """See ``Container.map_dma``."""
        self.container.map_dma(region.gpa, region.hva, region.size, writable=region.kind.dma_writable)

    def unmap(self, region: MemoryRegion) -> int:
        """See ``Container.unmap_dma``."""
        return self.container.unmap_dma(region.gpa, region.size)

    def unmap_rest(self) -> int:
        """See ``Container.unmap_all``."""
        return self.container.unmap_all()

    def ranges(self) -> tuple[Range, ...]:
        """They can shrink with each group that joins."""
        return self.container.get_info().ranges

    def hot_reset(self, device: Device, dependent: Sequence[DependentDevice]) -> None:
        """Show VFIO that we hold the groups of all that it resets; more groups than that are refused."""
        numbers = {one.group for one in dependent}
        device.pci_hot_reset([joined.group for number, joined in self._groups.items() if number in numbers])
