"""Uses by the kernel: memory, DMA channels, sockets, tunnels."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvmpass.host.address import Bdf
from kvmpass.host.kernel.processes import sockets_of
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PciDevice
from kvmpass.host.usage import VSOCK, Use
from kvmpass.host.usage.shares import VIRTIO

_CXL_MEMORY = 0x0502
PROTOCOL = "AF_VSOCK"  # net/vmw_vsock/af_vsock.c: vsock_proto


def kernel(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield each use by the kernel; for CXL memory and vsock it may not be visible."""
    for name in look.below("sys/class/dma", device.bdf):
        if look.sysfs.number("sys/class/dma", name, "in_use"):
            yield Use(f"the kernel uses its DMA channel {name}")
    yield from _virtio(look, device.bdf)
    attached = [name for name in look.below("sys/bus/thunderbolt/devices", device.bdf) if _is_attached(name)]
    if attached:
        yield Use(f"devices on Thunderbolt or USB4 depend on it ({', '.join(attached)})")
    if device.class_code >> 8 == _CXL_MEMORY and device.driver is not None:
        yield Use("its memory may be in use by the kernel or a DAX device", seen=False)


def _is_attached(name: str) -> bool:
    """``1-3`` is a device of domain 1; ``1-0`` the host's own router; names with a dot or a colon are not routers."""
    domain, separator, route = name.partition("-")
    return bool(separator) and domain.isdecimal() and route not in ("", "0") and route.isalnum()


def _virtio(look: Look, bdf: Bdf) -> Iterator[Use]:
    for name in look.below(VIRTIO, bdf):
        driver = look.sysfs.link(VIRTIO, name, "driver")
        if driver == "virtio_mem" and _is_plugged(look, name):
            yield Use("its memory is in use by the kernel (virtio-mem)")
        elif driver == "virtio_iommu":
            yield Use("it is an IOMMU of this host")
        elif driver == VSOCK:
            yield from _vsock(look)


def _is_plugged(look: Look, name: str) -> bool:
    """Whether the kernel has memory of a virtio-mem device (drivers/virtio/virtio_mem.c)."""
    below = False
    for line in (look.text("proc/iomem") or "").splitlines():
        what = line.partition(" : ")[2]
        below = (below and line.startswith(" ")) or what == name
        if below and what.startswith("System RAM"):
            return True
    return False


def _vsock(look: Look) -> Iterator[Use]:
    """No file lists these sockets; root can read the protocol of each socket of each process."""
    who = look.sysfs.ask("vsock", lambda: _vsock_now(look))
    if who is None:
        yield Use("sockets over vsock may be open, which only root can see", seen=False)
    elif who:
        yield Use(f"sockets over vsock are open in {' and '.join(who)}")


def _vsock_now(look: Look) -> list[str] | None:
    if str(look.sysfs.root) != "/" or os.geteuid() != 0:
        return None
    return [str(process) for process in sockets_of(look.sysfs, PROTOCOL)]
