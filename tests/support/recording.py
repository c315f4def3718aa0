"""A back end around another one, which notes what is mapped and unmapped."""

from __future__ import annotations

from typing import Any

from kvmpass.dma import Backend, BackendFactory, Mapper, Type1
from kvmpass.layout import Range
from kvmpass.memory import MemoryRegion

Calls = list[tuple[str, Range]]


class Recording:
    """A ``Backend`` that hands everything on to ``inner``; ``calls`` gets those that were acknowledged, in order."""

    def __init__(self, inner: Backend, calls: Calls) -> None:
        self.inner = inner
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def map(self, region: MemoryRegion) -> None:
        self.inner.map(region)
        self._calls.append(("map", region.range))

    def unmap(self, region: MemoryRegion) -> int:
        size = self.inner.unmap(region)
        self._calls.append(("unmap", region.range))
        return size


def recording(calls: Calls, around: BackendFactory = Type1) -> BackendFactory:
    """What a ``Machine`` or a ``Domain`` takes as its back end."""

    def make(mapper: Mapper) -> Backend:
        return Recording(around(mapper), calls)

    return make
