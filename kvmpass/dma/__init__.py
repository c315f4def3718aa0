"""The VM's one DMA domain, and the back ends below it."""

from kvmpass.dma.backend import Backend, BackendFactory, Mapper
from kvmpass.dma.domain import DmaCall, DmaMapping, Domain
from kvmpass.dma.type1 import Type1

__all__ = [
    "Backend",
    "BackendFactory",
    "DmaCall",
    "DmaMapping",
    "Domain",
    "Mapper",
    "Type1",
]
