"""The VM's one DMA domain, and the back ends below it."""

from kvmpass.dma.backend import Backend, BackendFactory, Mapper
from kvmpass.dma.domain import DmaMapping, Domain
from kvmpass.dma.iommufd import IommufdBackend
from kvmpass.dma.type1 import Type1

__all__ = [
    "Backend",
    "BackendFactory",
    "DmaMapping",
    "Domain",
    "IommufdBackend",
    "Mapper",
    "Type1",
]
