"""The VM's one DMA domain, and the back ends below it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.dma.backend import Backend as Backend
    from kvmpass.dma.backend import BackendFactory as BackendFactory
    from kvmpass.dma.backend import Mapper as Mapper
    from kvmpass.dma.domain import DmaMapping as DmaMapping
    from kvmpass.dma.domain import Domain as Domain
    from kvmpass.dma.iommufd import IommufdBackend as IommufdBackend
    from kvmpass.dma.type1 import Type1 as Type1

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.dma.backend": (
            "Backend",
            "BackendFactory",
            "Mapper",
        ),
        "kvmpass.dma.domain": (
            "DmaMapping",
            "Domain",
        ),
        "kvmpass.dma.iommufd": ("IommufdBackend",),
        "kvmpass.dma.type1": ("Type1",),
    },
)
