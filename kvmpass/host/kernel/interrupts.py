"""How many interrupts the host has had from a device on vfio-pci.

Source: drivers/vfio/pci/vfio_pci_intrs.c (``vfio_msi_set_vector_signal``, ``vfio_intx_enable``) names them,
kernel/irq/proc.c (``show_interrupts``) counts them.
"""

from __future__ import annotations

import re

from kvmpass.host.address import Bdf
from kvmpass.host.sysfs import Sysfs


def interrupt_counts(sysfs: Sysfs, bdf: Bdf) -> dict[int | str, int]:
    """Interrupts of each MSI or MSI-X vector that is set up now, by its number, or of ``"INTx"``, over all CPUs.

    Empty where no interrupt of the device is set up, or ``/proc/interrupts`` cannot be read.
    """
    name = re.compile(rf"\bvfio-(?:intx|msix?\[(?P<vector>\d+)\])\({re.escape(str(bdf))}\)")
    header, *lines = sysfs.lines("proc/interrupts") or [""]
    cpus = len(header.split())
    counts: dict[int | str, int] = {}
    for line in lines:
        if found := name.search(line):
            vector = found["vector"]
            counts["INTx" if vector is None else int(vector)] = sum(map(int, line.split()[1 : cpus + 1]))
    return counts
