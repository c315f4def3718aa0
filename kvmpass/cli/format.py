"""Text for facts about devices, for ``list`` and ``show``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from kvmpass import host
from kvmpass.cli import tables
from kvmpass.host.sysfs import VFIO_PCI
from kvmpass.layout import Reserved, size_text

if TYPE_CHECKING:
    from kvmpass.host.view.capabilities import Capabilities
    from kvmpass.host.view.description import BarInfo
    from kvmpass.host.view.inventory import DeviceStatus, HostStatus, Link, Sriov
    from kvmpass.host.view.isolation import Bridge, Sibling


def format_verdict(status: DeviceStatus, whole: HostStatus) -> str:
    """``yes``, or ``no`` and the first blocker: the device's own, else the host's."""
    if status.blockers:
        return click.style(f"no: {status.blockers[0].brief}", fg="yellow")
    if not whole.ready:
        return click.style("no: host not ready", fg="yellow")
    return click.style("yes, on vfio-pci" if status.device.driver == VFIO_PCI else "yes", fg="green")


def group_blockers(members: Sequence[DeviceStatus]) -> str | None:
    """Return the devices of a group that the host uses, which block the whole group; None if there are none."""
    used = sorted({bdf for status in members for blocker in status.blockers for bdf in blocker.blocked_by})
    return f"the host uses {', '.join(map(str, used))} of this group" if used else None


def format_link(link: Link | None) -> str | None:
    """``PCIe 8 GT/s x4``, with the maximum if it is higher; None if the device has no link."""
    if link is None:
        return None
    now, best = _lanes(link.speed_gts, link.width), _lanes(link.max_speed_gts, link.max_width)
    if not now:
        return f"PCIe link down (max {best})"
    return f"PCIe {now}" if now == best or not best else f"PCIe {now} (max {best})"


def _lanes(speed: float | None, width: int | None) -> str:
    parts = [f"{speed:g} GT/s" if speed else "", f"x{width}" if width else ""]
    return " ".join(part for part in parts if part)


def format_sriov(sriov: Sriov | None) -> str | None:
    """Return the physical function of a virtual one, else how many virtual functions are enabled."""
    if sriov is None:
        return None
    if sriov.physical_function is not None:
        return f"virtual function of {sriov.physical_function}"
    return f"{sriov.enabled} of {sriov.total} VFs enabled"


def format_resets(device: host.PciDevice) -> str:
    """Return the reset methods, in the order in which the kernel tries them."""
    return f"reset: {', '.join(device.reset_methods)}" if device.reset_methods else "no reset method"


# --- show


def format_bars(bars: Sequence[BarInfo]) -> Iterator[str]:
    """Yield a line for each BAR, in columns: name, size, kind, address."""
    rows = []
    for bar in bars:
        kind = "I/O ports" if bar.io else f"{bar.bits}-bit" + (", prefetchable" if bar.prefetchable else "")
        address = "no address" if bar.address is None else f"at {bar.address:#x}"
        rows.append((bar.name, size_text(bar.size), kind, address))
    yield from tables.table(rows, right=frozenset({1}))


def format_capabilities(own: Capabilities) -> Iterator[str]:
    """Yield a line for each capability that matters to an assignment, and one that names all others."""
    switches = (("memory", own.memory_enabled), ("I/O", own.io_enabled), ("bus mastering", own.bus_master))
    yield f"on: {', '.join(name for name, value in switches if value) or 'nothing'}"
    if own.msi:
        masking = ", each can be masked" if own.msi.maskable else ""
        yield f"MSI: {tables.count(own.msi.vectors, 'vector')}{masking}{_on(own.msi.enabled)}"
    if own.msix:
        where = f"table in BAR {own.msix.table_bar} at {own.msix.table_offset:#x}"
        yield f"MSI-X: {tables.count(own.msix.vectors, 'vector')}, {where}{_on(own.msix.enabled)}"
    if own.express:
        flr = ", function level reset" if own.express.flr else ", no function level reset"
        yield f"PCI Express: {own.express.kind}{flr if 'port' not in own.express.kind else ''}"
    if own.advanced_flr:
        yield "function level reset (advanced features)"
    if own.power:
        keeps = "; keeps its state in D3hot" if own.power.no_soft_reset else ""
        wakes = f"; wakes the host from {', '.join(own.power.pme_states)}" if own.power.pme_states else ""
        yield f"power: {', '.join(own.power.states)}{keeps}{wakes}"
    if own.sriov:
        yield f"SR-IOV: {own.sriov.enabled} of {own.sriov.total} virtual functions, id {own.sriov.device:04x}"
    if own.ats:
        yield f"ATS: translations cached in the device, queue of {own.ats.queue_depth}{_on(own.ats.enabled)}"
    if own.pri:
        yield f"PRI: page requests{_on(own.pri.enabled)}"
    if own.pasid:
        yield f"PASID: {own.pasid.width} bits{_on(own.pasid.enabled)}"
    if own.acs:
        yield f"ACS: has {' '.join(own.acs.supported) or 'nothing'}; on: {' '.join(own.acs.enabled) or 'nothing'}"
    others = [*(["AER"] if own.aer else []), *own.others]
    if others:
        yield f"also: {', '.join(others)}"


def _on(enabled: bool) -> str:
    return ", on" if enabled else ", off"


_ROLES = {
    "bridge": "a bridge: does not block the group",
    "no-driver": "no driver: does not block the group",
    "no-dma": "its driver does no DMA: does not block the group",
    "vfio": "bound to a VFIO driver",
    "blocks": "the host uses it: blocks the group",
}


def format_sibling(sibling: Sibling) -> str:
    """Another device of the group, and whether it blocks the group."""
    device = sibling.device
    driver = f" ({device.driver})" if device.driver else ""
    return f"with {device.bdf}{driver}, {_ROLES[sibling.role]}"


def format_bridge(bridge: Bridge) -> str:
    """Describe a bridge, and whether it isolates the devices behind it."""
    if not bridge.readable:
        means = "its registers are not readable without root"
    elif bridge.kind == "switch upstream port":
        means = "isolates nothing by itself; its downstream ports do"
    elif bridge.kind not in ("root port", "switch downstream port"):
        means = "devices behind it share one group: the IOMMU cannot distinguish them"
    elif bridge.acs is None:
        means = "no ACS: DMA between the devices behind it may bypass the IOMMU"
    elif bridge.missing:
        means = f"ACS without {' '.join(bridge.missing)}: DMA between the devices behind it may bypass the IOMMU"
    else:
        means = f"isolates the devices behind it (ACS {' '.join(bridge.acs.enabled)})"
    return f"{bridge.bdf} {bridge.kind}: {means}"


def format_acs(own: Capabilities) -> Sequence[str]:
    """Describe the ACS capability of a function, which isolates the functions of one device; empty if unknown."""
    if not own.readable:
        return []
    if own.acs is None:
        return ["no ACS capability; the group shows whether the kernel isolates it nevertheless"]
    return [f"ACS on: {' '.join(own.acs.enabled) or 'nothing'}"]


_RESERVED = {
    "msi": "interrupt messages",
    "reserved": "not translated by this host's IOMMU",
    "direct": "direct-mapped, as the firmware requires: Linux 6.6 and later refuses to assign the device",
    "direct-relaxable": "direct-mapped until the device is assigned",
}


def format_reserved(reserved: Reserved) -> str:
    """Describe a reserved range, and why it is reserved."""
    meaning = _RESERVED.get(reserved.kind, reserved.kind)
    return f"{reserved.range.start:#x}-{reserved.range.last:#x}: {meaning}"
