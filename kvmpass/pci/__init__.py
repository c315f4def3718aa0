"""The guest's view of PCI: bus, configuration space, BARs, INTx, MSI, MSI-X, the assigned function."""

from kvmpass.pci.assigned import AssignedFunction, Wiring
from kvmpass.pci.bus import CONFIG_ADDRESS, CONFIG_PORTS, ConfigPorts, Ecam, PciBus
from kvmpass.pci.space import BarSpace

__all__ = [
    "CONFIG_ADDRESS",
    "CONFIG_PORTS",
    "AssignedFunction",
    "BarSpace",
    "ConfigPorts",
    "Ecam",
    "PciBus",
    "Wiring",
]
