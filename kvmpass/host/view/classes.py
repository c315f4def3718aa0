"""Short names of PCI class codes.

Source: PCI Code and ID Assignment Specification, section 1.
"""

from __future__ import annotations

_SUB_CLASSES = {
    0x0001: "VGA, old",
    0x0100: "SCSI",
    0x0101: "IDE",
    0x0104: "RAID",
    0x0105: "ATA",
    0x0106: "SATA",
    0x0107: "SAS",
    0x0108: "NVMe",
    0x0109: "UFS",
    0x0200: "Ethernet",
    0x0207: "InfiniBand",
    0x0208: "fabric",
    0x0300: "VGA",
    0x0302: "3D",
    0x0400: "video",
    0x0401: "audio",
    0x0403: "audio",
    0x0500: "RAM",
    0x0501: "flash",
    0x0502: "CXL memory",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0607: "CardBus bridge",
    0x0609: "PCI bridge",
    0x0700: "serial port",
    0x0703: "modem",
    0x0800: "interrupts",
    0x0801: "DMA engine",
    0x0802: "timer",
    0x0803: "clock",
    0x0805: "SD host",
    0x0806: "IOMMU",
    0x0C00: "FireWire",
    0x0C03: "USB",
    0x0C04: "Fibre Channel",
    0x0C05: "SMBus",
    0x0C06: "InfiniBand",
    0x0C07: "IPMI",
    0x0D11: "Bluetooth",
}
_BASE_CLASSES = {
    0x00: "unclassified",
    0x01: "storage",
    0x02: "network",
    0x03: "display",
    0x04: "multimedia",
    0x05: "memory",
    0x06: "bridge",
    0x07: "communication",
    0x08: "system",
    0x09: "input",
    0x0A: "docking station",
    0x0B: "processor",
    0x0C: "serial bus",
    0x0D: "wireless",
    0x0E: "intelligent I/O",
    0x0F: "satellite",
    0x10: "encryption",
    0x11: "signal",
    0x12: "accelerator",
    0x13: "instrument",
    0x40: "coprocessor",
    0xFF: "no class",
}


def class_name(class_code: int) -> str:
    """Return the kind of device for a class code (24 bits), in a word or two; ``class 7701`` if unknown."""
    known = _SUB_CLASSES.get(class_code >> 8) or _BASE_CLASSES.get(class_code >> 16)
    return known or f"class {class_code >> 8:04x}"
