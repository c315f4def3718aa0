"""The guest's view of PCI: bus, configuration space, BARs, INTx, MSI, MSI-X, the assigned function."""

from kvmpass.pci.assigned import AssignedFunction
from kvmpass.pci.barspace import BarSpace
from kvmpass.pci.bus import ConfigPorts, Ecam, PciBus
from kvmpass.pci.function import BarSource, InterruptSink, PciFunction, PinSink, Wiring
from kvmpass.pci.preview import BarPreview, Vectors, allocate, preview_bars, preview_vectors

__all__ = [
    "AssignedFunction",
    "BarPreview",
    "BarSource",
    "BarSpace",
    "ConfigPorts",
    "Ecam",
    "InterruptSink",
    "PciBus",
    "PciFunction",
    "PinSink",
    "Vectors",
    "Wiring",
    "allocate",
    "preview_bars",
    "preview_vectors",
]
