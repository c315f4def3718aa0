"""Numbers in the modaliases of PCI functions."""

from __future__ import annotations

import pytest

from kvmpass.modalias import pci_ids

NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"


def test_the_numbers_of_a_function() -> None:
    assert pci_ids(NVME) == [0x1B36, 0x10, 0x1AF4, 0x1100, 1, 8, 2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "usb:v1D6Bp0002d0612dc09dsc00dp01ic09isc00ip00in00",
        NVME[:-1],
        NVME + "0",
        NVME + "\n",
        NVME.lower(),
        NVME.replace("v00001B36", "v    1B36"),
        NVME.replace("v00001B36", "v0_001B36"),
        NVME.replace("d00000010", "d+0000010"),
        NVME.replace("d00000010", "d*"),
        NVME.replace("sc08", "sx08"),
    ],
)
def test_nothing_else_is_taken_for_one(text: str) -> None:
    assert pci_ids(text) is None
