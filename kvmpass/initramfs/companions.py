"""The drivers of devices behind a PCI device.

A controller's modalias matches the controller's driver. The disks of a SATA controller, the devices on a USB bus and
the function of a virtio device have drivers of their own, which udev would load.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmpass.modalias import pci_ids

MASS_STORAGE, NVM, SERIAL_BUS, USB = 0x01, 0x08, 0x0C, 0x03  # PCI Code and ID Assignment, classes and subclasses

_VIRTIO_VENDOR, _VIRTIO_MODERN, _VIRTIO_TRANSITIONAL = 0x1AF4, 0x1040, 0x1000
_VIRTIO_SCSI = 8
_DISK = ("sd_mod",)


def companions(modaliases: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the drivers of devices behind the PCI devices with these modaliases: modaliases, and names of modules.

    Other devices have none.
    """
    aliases: list[str] = []
    modules: list[str] = []
    for vendor, device, _, subsystem, kind, subkind, _ in filter(None, map(pci_ids, modaliases)):
        virtio = _virtio_type(vendor, device, subsystem)
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
