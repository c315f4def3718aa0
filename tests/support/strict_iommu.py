"""A back end whose IOMMU is made up, for devices of ``fake_function`` with peer-to-peer: strict."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from kvmpass.dma import Mapper
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion
from support.fake_function import FakeDevice


class StrictIommu:
    """Maps only what responds: a BAR in a window for BARs, of a device that decodes memory and is awake.

    A device must not stop to respond while a BAR of it is mapped. What ``refuse`` raises has not been done.
    """

    active = True

    def __init__(
        self, mapper: Mapper, devices: Sequence[FakeDevice], windows: Sequence[Range], refuse: Callable[[], None]
    ) -> None:
        self.mapped: dict[Range, FakeDevice] = {}
        self.calls = 0
        self._mapper = mapper
        self._windows = windows
        self._refuse = refuse
        self._devices = {device.name: device for device in devices}
        for device in devices:
            device.config.before_silence = partial(self._check_silence, device)

    def _check_silence(self, device: FakeDevice) -> None:
        assert device not in self.mapped.values(), f"{device.name} stops to respond where it is mapped"

    @contextmanager
    def attaching(self, name: str, group: int, vf_token: uuid.UUID | None = None) -> Iterator[Any]:
        self._mapper.map_all()
        yield lambda: lambda: self._devices[name]

    def detach(self, device: Any) -> None:
        self._check_silence(device)

    def map(self, region: MemoryRegion) -> None:
        self._refuse()
        device = region.mapping.device  # type: ignore[attr-defined]
        assert device.config.memory_enabled, "the kernel would refuse it"
        assert any(window.contains(region.range) for window in self._windows), f"mapped at {region.range}"
        assert not any(other.overlaps(region.range) for other in self.mapped), f"two mappings at {region.range}"
        self.mapped[region.range] = device
        self.calls += 1

    def unmap(self, region: MemoryRegion) -> int:
        self._refuse()
        return region.size if self.mapped.pop(region.range, None) else 0

    def unmap_rest(self) -> int:
        left = sum(range_.size for range_ in self.mapped)
        self.mapped.clear()
        return left

    def ranges(self) -> tuple[Range, ...]:
        return ()

    def hot_reset(self, device: Any, dependent: object) -> None:
        raise OSError(errno.ENODEV, "no slot, no bus")

    def close(self) -> None:
        assert self.mapped == {}
