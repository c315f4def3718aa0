"""Names of devices from udev's hardware database. Optional: everything works without."""

from __future__ import annotations

from typing import Any

from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PciDevice, Sysfs


def name_of(bdf: Bdf) -> str | None:
    """``vendor model`` as udev knows it, or None: no libudev, no udev, no database, no such device."""
    try:
        import pyudev  # type: ignore[import-untyped]

        context: Any = pyudev.Context()
        device: Any = pyudev.Devices.from_name(context, "pci", str(bdf))
        vendor = device.properties.get("ID_VENDOR_FROM_DATABASE")
        model = device.properties.get("ID_MODEL_FROM_DATABASE")
    except Exception:  # a name is a courtesy: pyudev, libudev and ctypes fail in many ways
        return None
    return " ".join(part for part in (vendor, model) if part) or None


def device_name(sysfs: Sysfs, device: PciDevice) -> str:
    """The same, or vendor and device number; udev knows this machine only, no recorded tree."""
    known = name_of(device.bdf) if str(sysfs.root) == "/" else None
    return known or f"{device.vendor:04x}:{device.device:04x}"
