"""Names of devices, which are cosmetic.

Sources: udev's hardware database; else ``pci.ids`` of pciutils or hwdata, whose format its header describes.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kvmpass._lazy import lazy_pattern
from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import PciDevice, Sysfs

PCI_IDS = ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids")

_BRAND = lazy_pattern(r"\[([^\[\]]+)\]$")  # pci.ids has the common name in brackets
_LEGAL_FORM = lazy_pattern(
    r",? +(?:Co\.?,? *Ltd|Corporation|Corp|Company|Incorporated|Inc|Limited|Ltd|LLC|GmbH|AG|S\.?A)\.?$", re.IGNORECASE
)


def _from_udev(bdf: Bdf) -> tuple[str | None, str | None]:
    try:
        import pyudev  # type: ignore[import-untyped]

        context: Any = pyudev.Context()
        device: Any = pyudev.Devices.from_name(context, "pci", str(bdf))
        vendor = device.properties.get("ID_VENDOR_FROM_DATABASE")
        model = device.properties.get("ID_MODEL_FROM_DATABASE")
    except Exception:  # pyudev, libudev and ctypes fail in many ways
        return None, None
    return vendor, model


class Names:
    """The names of a host's devices. Reads ``pci.ids`` once, for the first name.

    Synchronization: for one thread.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs
        self._known: dict[tuple[Bdf, int, int], tuple[str | None, str | None]] = {}
        # udev knows the devices of this machine, not those of a recorded tree.
        self._udev = sysfs.root == Path("/") and sysfs.exists("run/udev/data")

    def of(self, device: PciDevice) -> str:
        """Return vendor and model in full; the ID for an unknown model, ``vendor:device`` for an unknown vendor."""
        return self.of_ids(device.bdf, device.vendor, device.device)

    def of_ids(self, bdf: Bdf, vendor: int, device: int) -> str:
        """Return the same for a device that may be removed."""
        vendor_name, model = self._parts(bdf, vendor, device)
        if vendor_name is None:
            return f"{vendor:04x}:{device:04x}"
        return f"{vendor_name} {model or f'device {device:04x}'}"

    def short(self, device: PciDevice) -> str:
        """Return the same with the vendor's brand instead of its full name."""
        full = self.of(device)
        vendor, _ = self._parts(device.bdf, device.vendor, device.device)
        return f"{_brand(vendor)}{full.removeprefix(vendor)}" if vendor else full

    def subsystem(self, device: PciDevice) -> str | None:
        """Return the name of the card or board from ``pci.ids``; None if unknown."""
        ids = (device.vendor, device.device, device.subsystem_vendor, device.subsystem_device)
        question = "subsystem " + ":".join(f"{number:04x}" for number in ids)
        return self._sysfs.ask(question, lambda: _subsystem(self._pci_ids, *ids))

    def _parts(self, bdf: Bdf, vendor: int, device: int) -> tuple[str | None, str | None]:
        key = (bdf, vendor, device)
        if key not in self._known:
            question = f"name {bdf} {vendor:04x}:{device:04x}"
            vendor_name, model = self._sysfs.ask(question, lambda: self._look_up(*key))
            self._known[key] = vendor_name, model
        return self._known[key]

    def _look_up(self, bdf: Bdf, vendor: int, device: int) -> tuple[str | None, str | None]:
        names = _from_udev(bdf) if self._udev else (None, None)
        return names if names[0] else _vendor_and_model(self._pci_ids, vendor, device)

    @cached_property
    def _pci_ids(self) -> bytes:
        for place in PCI_IDS:
            with suppress(OSError):
                return b"\n" + self._sysfs.data(place)
        return b""


def _brand(vendor: str) -> str:
    """``Advanced Micro Devices, Inc. [AMD]`` is AMD, ``Red Hat, Inc.`` is Red Hat."""
    brand = _BRAND.search(vendor)
    if brand:
        return brand[1]
    while (shorter := _LEGAL_FORM.sub("", vendor)) != vendor:
        vendor = shorter
    return vendor


def _entry(block: bytes, key: bytes, depth: int) -> tuple[str | None, bytes]:
    """Return the name of the entry ``key``, and the lines of the entries below it; ``depth`` is its indentation."""
    start = b"\n" + b"\t" * depth + key + b"  "
    at = block.find(start)
    if at < 0:
        return None, b""
    stop = block.find(b"\n", at + len(start))
    stop = len(block) if stop < 0 else stop
    following = re.compile(rb"\n\t{0,%d}[^\t#\n]" % depth).search(block, stop)
    name = block[at + len(start) : stop].decode(errors="replace").strip()
    return name, block[stop : following.start() if following else len(block)]


@lru_cache(maxsize=64)  # a search takes a millisecond, and a host has many devices of few vendors
def _vendor(table: bytes, vendor: int) -> tuple[str | None, bytes]:
    return _entry(table, b"%04x" % vendor, 0)


def _vendor_and_model(table: bytes, vendor: int, device: int) -> tuple[str | None, str | None]:
    name, models = _vendor(table, vendor)
    return name, _entry(models, b"%04x" % device, 1)[0]


def _subsystem(table: bytes, vendor: int, device: int, sub_vendor: int, sub_device: int) -> str | None:
    _, models = _vendor(table, vendor)
    _, subsystems = _entry(models, b"%04x" % device, 1)
    return _entry(subsystems, b"%04x %04x" % (sub_vendor, sub_device), 2)[0]
