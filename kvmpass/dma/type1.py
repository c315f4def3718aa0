"""VFIO's type 1 container as a back end: IOMMU groups join it, and memory is mapped in it.

The order: open the group, join the container, set its IOMMU (the first group), map all memory, register the group
with KVM, open the device. The container has an IOMMU only while a group is in it: the kernel unmaps everything when
the last group leaves.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from kvmpass._dataclass import dataclass
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import AuditFailed, Closed
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from kvmpass.vfio import Container, DependentDevice, Device, Group

if TYPE_CHECKING:
    from kvmpass.dma.backend import Mapper, Open


@dataclass(slots=True)
class _Joined:
    """A group in the container, and its devices that are open."""

    group: Group
    devices: list[Device]
    attaching: int = 0


class Type1:
    """A ``Backend``: one container, opened for the first group and closed after the last.

    ``container`` and ``group`` open them; by default by their nodes.

    Synchronization: see ``Backend``.
    """

    def __init__(
        self,
        mapper: Mapper,
        *,
        container: Callable[[], Container] | None = None,
        group: Callable[[int], Group] | None = None,
    ) -> None:
        self._mapper = mapper
        self._make_container, self._make_group = container, group
        self._container: Container | None = None
        self._groups: dict[int, _Joined] = {}

    @property
    def active(self) -> bool:
        """Whether a group is in the container."""
        return bool(self._groups)

    @contextmanager
    def attaching(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Iterator[Open]:
        """See ``Backend``. A group joins with its first device; only the first group maps memory."""
        opened: list[Device] = []
        with undo_on_error() as undo:
            found = self._groups.get(group)
            joined = found if found and (found.devices or found.attaching) else self._join(group)
            if joined is not found:
                undo.callback(self._leave, group)
                self._mapper.map_all()
                self._mapper.file_add(joined.group.fd)

            def open_device() -> Callable[[], Device]:
                opened.append(joined.group.get_device_fd(name, vf_token))
                return lambda: opened[0]

            joined.attaching += 1
            try:
                yield open_device
            except BaseException as error:
                run_all(*(device.close for device in opened), failure=error)
                raise
            finally:
                joined.attaching -= 1
            joined.devices += opened

    def detach(self, device: Device) -> None:
        """See ``Backend``. A group leaves with its last device."""
        number, devices = next((n, joined.devices) for n, joined in self._groups.items() if device in joined.devices)
        leave = (partial(self._leave, number),) if len(devices) == 1 else ()
        run_all(device.close, partial(devices.remove, device), *leave)

    def _join(self, number: int) -> _Joined:
        if number in self._groups:  # it could not leave before
            self._leave(number)
        with undo_on_error() as undo:
            group = (self._make_group or Group)(number)
            undo.callback(group.close)
            if self._container is None:
                self._container = (self._make_container or Container)()
                undo.callback(self._close_container)
                if self._mapper.p2p:
                    self._container.check_p2p()
            group.set_container(self._container)
            undo.callback(group.unset_container)
            if not self._groups:
                self._container.set_iommu()
            joined = self._groups[number] = _Joined(group, [])
        return joined

    def _leave(self, number: int) -> None:
        group, last = self._groups[number].group, len(self._groups) == 1

        def leave_container() -> None:
            self._unless_removed(group, group.unset_container)
            del self._groups[number]
            run_all(group.close, *([self._close_container] if last else []))

        unmap = [partial(self._unless_removed, group, self._mapper.unmap_all)] if last else []
        run_all(partial(self._mapper.file_del, group.fd), *unmap, leave_container)

    @staticmethod
    def _unless_removed(group: Group, step: Callable[[], None]) -> None:
        """Run ``step``, which may fail where VFIO has removed the group, and all mappings with it.

        It does so when the last device of the group is unbound, once that device is closed.
        """
        try:
            step()
        except (OSError, AuditFailed):
            if not group.removed:
                raise

    def _close_container(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def close(self) -> None:
        """See ``Backend``: remove the groups that could not leave before."""
        run_all(*(partial(self._leave, number) for number in list(self._groups)))

    # --- mappings

    @property
    def container(self) -> Container:
        """The container. Raises ``Closed`` unless ``active``."""
        if self._container is None:
            raise Closed("the container is open only while a device is attached")
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
        """See ``Container.iova_ranges``. They can shrink with each group that joins."""
        return self.container.iova_ranges()

    def hot_reset(self, device: Device, dependent: Sequence[DependentDevice]) -> None:
        """See ``Device.pci_hot_reset``. VFIO refuses groups without a dependent device."""
        numbers = {other.group for other in dependent}
        device.pci_hot_reset([joined.group for number, joined in self._groups.items() if number in numbers])
