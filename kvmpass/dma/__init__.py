"""The VM's one DMA domain."""

from kvmpass.dma.domain import DmaCall, DmaMapping, Domain

__all__ = [
    "DmaCall",
    "DmaMapping",
    "Domain",
]
