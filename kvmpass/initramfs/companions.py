"""The drivers of devices behind a PCI device.

A controller's modalias matches the controller's driver. The disks of a SATA controller, the devices on a USB bus and
the function of a virtio device have drivers of their own, which udev would load.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmpass._lazy import lazy_pattern

MASS_STORAGE, NVM, SERIAL_BUS, USB = 0x01, 0x08, 0x0C, 0x03  # PCI Code and ID Assignment, classes and subclasses

_MODALIAS = lazy_pattern(
    r"pci:v(?P<vendor>[0-9A-F]{8})d(?P<device>[0-9A-F]{8})sv[0-9A-F]{8}sd(?P<subsystem>[0-9A-F]{8})"
    r"bc(?P<class>[0-9A-F]{2})sc(?P<subclass>[0-9A-F]{2})"
)
_VIRTIO_VENDOR, _VIRTIO_MODERN, _VIRTIO_TRANSITIONAL = 0x1AF4, 0x1040, 0x1000
_VIRTIO_SCSI = 8
_DISK = ("sd_mod",)


def companions(modaliases: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the drivers of devices behind the PCI devices with these modaliases: modaliases, and names of modules.

    Other devices have none.
    """
    aliases: list[str] = []
    modules: list[str] = []
    for match in filter(None, map(_MODALIAS.match, modaliases)):
        kind, subkind = int(match["class"], 16), int(match["subclass"], 16)
        virtio = _virtio_type(int(match["vendor"], 16), int(match["device"], 16), int(match["subsystem"], 16))
        if virtio is not None:
            aliases.append(f"virtio:d{virtio:08X}v{_VIRTIO_VENDOR:08X}")
        if virtio == _VIRTIO_SCSI or (virtio is None and kind == MASS_STORAGE and subkind != NVM):
            modules += _DISK
        elif (kind, subkind) == (SERIAL_BUS, USB):
            modules += ("usb_storage", "uas", *_DISK)
    return list(dict.fromkeys(aliases)), list(dict.fromkeys(modules))


def _virtio_type(vendor: int, device: int, subsystem: int) -> int | None:
    """Return the virtio device type of a PCI device (Virtual I/O Device 1.2, 4.1.2); None: not virtio."""
    if vendor != _VIRTIO_VENDOR:
        return None
    if _VIRTIO_MODERN < device <= _VIRTIO_MODERN + 0x3F:
        return device - _VIRTIO_MODERN
    return subsystem if _VIRTIO_TRANSITIONAL <= device < _VIRTIO_MODERN else None
