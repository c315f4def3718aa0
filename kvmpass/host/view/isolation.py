"""Isolation of a device: the siblings in its IOMMU group, and the bridges between it and the root bus.

The kernel's decision is the IOMMU group; this module shows the reasons. Source: drivers/iommu/iommu.c
(pci_device_group) and drivers/pci/pci.c (pci_acs_enabled). The kernel also has a list of devices that isolate without
an ACS capability (drivers/pci/quirks.c: pci_dev_specific_acs_enabled), which user space cannot read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from kvmpass._dataclass import dataclass
from kvmpass.host.address import Bdf, on_path
from kvmpass.host.blockers import is_harmless
from kvmpass.host.look import Look
from kvmpass.host.sysfs import VFIO_PCI, IommuGroup, PciDevice, Sysfs
from kvmpass.host.view.capabilities import Acs, Capabilities, capabilities_of

# The kernel puts devices below a port into groups of their own only with these bits (REQ_ACS_FLAGS).
REQUIRED = ("SV", "RR", "CR", "UF")

Role = Literal["assigned", "bridge", "no-driver", "no-dma", "vfio", "blocks"]


@dataclass(frozen=True, slots=True)
class Sibling:
    """Another device of the group."""

    device: PciDevice
    """The device."""
    short_name: str
    """Vendor and model, with the vendor's brand."""
    role: Role
    """Its effect on the group's viability.

    ``bridge`` and ``no-driver`` do no DMA for the host, ``no-dma`` has a driver that does none (pci-stub, pcieport),
    ``vfio`` is bound to vfio-pci, ``blocks`` has a host driver: the group is not viable. ``assigned`` is assigned,
    too.
    """


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge upstream of a device."""

    bdf: Bdf
    """Its address."""
    kind: str
    """Its PCI Express type as text, or ``conventional bridge``."""
    acs: Acs | None
    """Its ACS capability; None without one."""
    isolates: bool | None
    """Whether it isolates the devices below it; None if unknown, and for a switch's upstream port."""
    missing: tuple[str, ...]
    """Required ACS bits that it supports and that are disabled."""
    readable: bool
    """Whether this user can read its capabilities."""


def siblings(look: Look, device: PciDevice, group: IommuGroup, together: Iterable[Bdf] = ()) -> list[Sibling]:
    """Return the other devices of the group, by address; ``together`` are assigned with ``device``."""
    others = [other for bdf in group.devices if bdf != device.bdf and (other := look.device(bdf))]
    return [Sibling(other, look.names.short(other), _role(other, together)) for other in others]


def _role(device: PciDevice, together: Iterable[Bdf]) -> Role:
    if device.bdf in together:
        return "assigned"
    if device.is_pci_bridge:
        return "bridge"
    if device.driver is None:
        return "no-driver"
    if device.driver == VFIO_PCI:
        return "vfio"
    return "no-dma" if is_harmless(device) else "blocks"


def bridges_above(sysfs: Sysfs, bdf: Bdf) -> list[Bridge]:
    """Return the bridges upstream of the device, nearest first; empty for a device on a root bus."""
    above = on_path(os.path.realpath(sysfs.device_path(bdf)))[:-1]
    return [_bridge(sysfs, bridge) for bridge in reversed(above)]


def _bridge(sysfs: Sysfs, bdf: Bdf) -> Bridge:
    own = capabilities_of(sysfs, bdf)
    kind = own.express.kind if own.express else "conventional bridge" if own.readable else "bridge"
    isolates, missing = acs_state(own)
    return Bridge(bdf, kind, own.acs, isolates, missing, own.readable)


def acs_state(own: Capabilities) -> tuple[bool | None, tuple[str, ...]]:
    """Return whether a bridge isolates, and the required bits that are disabled (pci_acs_flags_enabled).

    A required bit that the bridge does not support counts as enabled. A conventional bridge never isolates: requests
    from below it have the bridge's requester ID, or none.
    """
    if not own.readable:
        return None, ()
    if own.express is None or own.express.kind not in ("root port", "switch downstream port"):
        return (None if own.express and own.express.kind == "switch upstream port" else False), ()
    if own.acs is None:
        return False, ()
    missing = tuple(bit for bit in REQUIRED if bit in own.acs.supported and bit not in own.acs.enabled)
    return not missing, missing
