"""What keeps a device apart from others: the siblings of its group, and the bridges between it and the root.

The kernel's verdict is the IOMMU group itself; what is told here is why it came out so. Source: drivers/iommu/iommu.c
(pci_device_group) and drivers/pci/pci.c (pci_acs_enabled). The kernel also has a list of devices that isolate without
saying so (drivers/pci/quirks.c: pci_dev_specific_acs_enabled), which cannot be read from outside.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from kvmpass.errors import NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.blockers import is_harmless
from kvmpass.host.sysfs import IommuGroup, PciDevice, Sysfs
from kvmpass.host.view.capabilities import Acs, Capabilities, capabilities_of

# What the kernel asks for before it tells apart what is behind a port (REQ_ACS_FLAGS).
REQUIRED = ("SV", "RR", "CR", "UF")

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")

Part = Literal["bridge", "no-driver", "left-alone", "vfio", "in-the-way"]


@dataclass(frozen=True, slots=True)
class Sibling:
    """Another device of the group. ``part`` in whether the group can be handed out:

    ``bridge`` and ``no-driver`` do no DMA for the host, ``left-alone`` has a driver that does none (pci-stub,
    pcieport), ``vfio`` is handed out already, ``in-the-way`` is a device that the host uses.
    """

    device: PciDevice
    part: Part


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge above a device. ``kind`` is its PCI Express type in words, or ``conventional bridge``.

    ``isolates`` says whether it keeps apart what is behind it; None where its registers cannot be read, or where it
    has no part in that (a switch's upstream port). ``missing`` are required bits that it has and that are off.
    """

    bdf: Bdf
    kind: str
    acs: Acs | None
    isolates: bool | None
    missing: tuple[str, ...]
    readable: bool


def siblings(sysfs: Sysfs, device: PciDevice, group: IommuGroup) -> list[Sibling]:
    """The other devices of the group, by address."""
    found = []
    for bdf in group.devices:
        if bdf != device.bdf:
            try:
                other = sysfs.device(bdf)
            except NoSuchDevice:  # unplugged meanwhile
                continue
            found.append(Sibling(other, _part(other)))
    return found


def _part(device: PciDevice) -> Part:
    if device.is_pci_bridge:
        return "bridge"
    if device.driver is None:
        return "no-driver"
    if device.driver == "vfio-pci":
        return "vfio"
    return "left-alone" if is_harmless(device) else "in-the-way"


def bridges_above(sysfs: Sysfs, bdf: Bdf) -> list[Bridge]:
    """The bridges from the one next to the device up to the root; empty for a device on a root bus."""
    path = os.path.realpath(sysfs.device_path(bdf)).split("/")
    return [_bridge(sysfs, Bdf.parse(part)) for part in reversed(path[:-1]) if _ADDRESS.fullmatch(part)]


def _bridge(sysfs: Sysfs, bdf: Bdf) -> Bridge:
    own = capabilities_of(sysfs, bdf)
    kind = own.express.kind if own.express else "conventional bridge" if own.readable else "bridge"
    isolates, missing = acs_state(own)
    return Bridge(bdf, kind, own.acs, isolates, missing, own.readable)


def acs_state(own: Capabilities) -> tuple[bool | None, tuple[str, ...]]:
    """Whether a bridge isolates, and the required bits that are off (pci_acs_flags_enabled).

    A required bit that the bridge does not have counts as always on. What is no PCI Express bridge never isolates:
    behind it requests carry the bridge's number, or none.
    """
    if not own.readable:
        return None, ()
    if own.express is None or own.express.kind not in ("root port", "switch downstream port"):
        return (None if own.express and own.express.kind == "switch upstream port" else False), ()
    if own.acs is None:
        return False, ()
    missing = tuple(bit for bit in REQUIRED if bit in own.acs.supported and bit not in own.acs.enabled)
    return not missing, missing
