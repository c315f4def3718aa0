"""The guest's view of PCI: bus, configuration space, BARs, INTx, MSI, MSI-X, the assigned function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.pci.assigned import AssignedFunction as AssignedFunction
    from kvmpass.pci.barspace import BarSpace as BarSpace
    from kvmpass.pci.bus import ConfigPorts as ConfigPorts
    from kvmpass.pci.bus import Ecam as Ecam
    from kvmpass.pci.bus import PciBus as PciBus
    from kvmpass.pci.function import BarSource as BarSource
    from kvmpass.pci.function import InterruptSink as InterruptSink
    from kvmpass.pci.function import PciFunction as PciFunction
    from kvmpass.pci.function import PinSink as PinSink
    from kvmpass.pci.function import Wiring as Wiring
    from kvmpass.pci.preview import BarPreview as BarPreview
    from kvmpass.pci.preview import Vectors as Vectors
    from kvmpass.pci.preview import allocate as allocate
    from kvmpass.pci.preview import preview_bars as preview_bars
    from kvmpass.pci.preview import preview_vectors as preview_vectors

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.pci.assigned": ("AssignedFunction",),
        "kvmpass.pci.barspace": ("BarSpace",),
        "kvmpass.pci.bus": (
            "ConfigPorts",
            "Ecam",
            "PciBus",
        ),
        "kvmpass.pci.function": (
            "BarSource",
            "InterruptSink",
            "PciFunction",
            "PinSink",
            "Wiring",
        ),
        "kvmpass.pci.preview": (
            "BarPreview",
            "Vectors",
            "allocate",
            "preview_bars",
            "preview_vectors",
        ),
    },
)
