"""Modaliases of PCI functions (drivers/pci/pci-sysfs.c: modalias_show)."""

from __future__ import annotations

_FORM = "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02X}sc{:02X}i{:02X}"
_PLACES = ((5, 13), (14, 22), (24, 32), (34, 42), (44, 46), (48, 50), (51, 53))  # of the numbers


def pci_ids(modalias: str) -> list[int] | None:
    """Return the numbers in the modalias of a PCI function; None for another text.

    Vendor, device, subsystem vendor, subsystem, base class, sub-class, programming interface.
    """
    # By hand: to compile a regular expression for it takes as long as importing five modules.
    try:
        numbers = [int(modalias[start:end], 16) for start, end in _PLACES]
    except ValueError:
        return None
    return numbers if _FORM.format(*numbers) == modalias else None
