"""What /proc/interrupts says of a device on vfio-pci."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.host import Bdf, Sysfs
from kvmpass.host.kernel.interrupts import interrupt_counts

TEXT = """\
            CPU0       CPU1
   0:        117          0  IR-IO-APIC    2-edge      timer
  22:          1         40  IR-IO-APIC   22-fasteoi   ehci_hcd:usb1, vfio-intx(0000:02:00.0)
  31:          0          3  IR-PCI-MSIX-0000:01:00.0    0-edge      vfio-msix[0](0000:01:00.0)
  40:    4000000    2000007  IR-PCI-MSIX-0000:01:00.0   17-edge      vfio-msix[17](0000:01:00.0)
  41:          5          0  IR-PCI-MSIX-0000:01:00.1    0-edge      vfio-msix[0](0000:01:00.1)
  42:          6          0  IR-PCI-MSI-0000:03:00.0    0-edge      vfio-msi[0](0000:03:00.0)
  43:          9          9  IR-PCI-MSIX-0000:04:00.0    0-edge      nvme0q0
 NMI:          0          0   Non-maskable interrupts
 ERR:          0
"""


@pytest.mark.parametrize(
    ("bdf", "counts"),
    [
        ("0000:01:00.0", {0: 3, 17: 6000007}),
        ("0000:01:00.1", {0: 5}),
        ("0000:02:00.0", {"INTx": 41}),
        ("0000:03:00.0", {0: 6}),
        ("0000:04:00.0", {}),
    ],
    ids=["MSI-X", "another function", "shared INTx", "MSI", "another driver's"],
)
def test_vectors_are_told_apart_and_added_up(tmp_path: Path, bdf: str, counts: dict[int | str, int]) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "interrupts").write_text(TEXT)
    assert interrupt_counts(Sysfs(tmp_path), Bdf.parse(bdf)) == counts


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_nothing_to_read(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "proc").mkdir()
    if text is not None:
        (tmp_path / "proc" / "interrupts").write_text(text)
    assert interrupt_counts(Sysfs(tmp_path), Bdf.parse("0000:01:00.0")) == {}
