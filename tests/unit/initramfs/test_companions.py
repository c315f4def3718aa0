"""Drivers for the devices behind a PCI device."""

from __future__ import annotations

import pytest

from kvmpass.initramfs.companions import companions

STICK = ("usb_storage", "uas", "sd_mod")


def modalias(vendor: int, device: int, class_code: int, subsystem: int = 0) -> str:
    base, sub, interface = class_code >> 16, class_code >> 8 & 0xFF, class_code & 0xFF
    return f"pci:v{vendor:08X}d{device:08X}sv{vendor:08X}sd{subsystem:08X}bc{base:02X}sc{sub:02X}i{interface:02X}"


@pytest.mark.parametrize(
    ("device", "modaliases", "modules"),
    [
        (modalias(0x8086, 0x2922, 0x010601), (), ("sd_mod",)),  # AHCI
        (modalias(0x1000, 0x0097, 0x010700), (), ("sd_mod",)),  # SAS
        (modalias(0x1B36, 0x0010, 0x010802), (), ()),  # NVMe
        (modalias(0x1B36, 0x000D, 0x0C0330), (), STICK),  # xHCI
        (modalias(0x8086, 0x2930, 0x0C0500), (), ()),  # SMBus
        (modalias(0x8086, 0x10D3, 0x020000), (), ()),
        (modalias(0x1AF4, 0x1042, 0x010000), ("virtio:d00000002v00001AF4",), ()),  # block
        (modalias(0x1AF4, 0x1001, 0x010000, 2), ("virtio:d00000002v00001AF4",), ()),  # block, transitional
        (modalias(0x1AF4, 0x1048, 0x010000), ("virtio:d00000008v00001AF4",), ("sd_mod",)),  # SCSI
        (modalias(0x1AF4, 0x1110, 0x050000), (), ()),  # ivshmem has the vendor, and is no virtio device
        ("usb:v1234p5678", (), ()),
    ],
)
def test_companions(device: str, modaliases: tuple[str, ...], modules: tuple[str, ...]) -> None:
    assert companions([device]) == ([*modaliases], [*modules])


def test_companions_of_several_devices_are_unique() -> None:
    found = companions([modalias(0x8086, 0x2922, 0x010601), modalias(0x1B36, 0x000D, 0x0C0330)])
    assert found == ([], ["sd_mod", "usb_storage", "uas"])
