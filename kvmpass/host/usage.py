"""What the host does with a device at this moment: the reasons not to take it away."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kvmpass.host.address import Bdf
from kvmpass.host.look import Look
from kvmpass.host.sysfs import IOMMU_GROUPS, NOIOMMU_NAME, PCI_DEVICES, PciDevice, Sysfs

VFIO_PCI = "vfio-pci"


def usage(look: Look, device: PciDevice) -> list[str]:
    """One clause for each use the host or another process makes of the device; empty when it is idle.

    Covers the storage, network and other functions below the device, whatever the depth (a disk at a SATA port,
    a USB stick at a controller): mounted, swap, holders (LVM, md, dm-crypt), exclusively opened otherwise, default
    route, open nodes, enabled virtual functions, boot display. Without root, other users' processes stay unseen.
    """
    reasons = [
        *_display(look.sysfs, device),
        *_virtual_functions(look.sysfs, device.bdf),
        *_storage(look, device.bdf),
        *_network(look, device.bdf),
        *_open_nodes(look, device.bdf),
    ]
    return list(dict.fromkeys(reasons))


def vfio_nodes(sysfs: Sysfs, bdf: Bdf, group: int | None) -> list[str]:
    """The nodes through which a process can own the device: its group's, its own character device."""
    nodes = []
    if group is not None:
        no_iommu = sysfs.text(IOMMU_GROUPS, str(group), "name") == NOIOMMU_NAME
        nodes.append(f"/dev/vfio/{'noiommu-' if no_iommu else ''}{group}")  # drivers/vfio/group.c
    nodes += [f"/dev/vfio/devices/{name}" for name in sysfs.names(PCI_DEVICES, str(bdf), "vfio-dev")]
    return nodes


def _display(sysfs: Sysfs, device: PciDevice) -> Iterator[str]:
    if device.driver == VFIO_PCI:  # given up by its owner already
        return
    base = f"{PCI_DEVICES}/{device.bdf}"
    if sysfs.text(base, "boot_vga") == "1" or sysfs.text(base, "boot_display") == "1":
        yield "it is the display this host booted with"


def _virtual_functions(sysfs: Sysfs, bdf: Bdf) -> Iterator[str]:
    count = sysfs.number(PCI_DEVICES, str(bdf), "sriov_numvfs") or 0
    if count:
        yield f"{count} virtual functions are enabled on it and would vanish"


def block_devices(look: Look, bdf: Bdf) -> list[str]:
    """Disks and partitions below the function, such as ``nvme0n1`` and ``nvme0n1p1``."""
    found = set(look.below("sys/class/block", bdf))
    # With native multipath the namespaces hang below the NVMe subsystem, not below the controller.
    controllers = set(look.below("sys/class/nvme", bdf))
    for subsystem in look.sysfs.names("sys/class/nvme-subsystem"):
        if controllers.isdisjoint(look.sysfs.names("sys/class/nvme-subsystem", subsystem)):
            continue
        found.update(look.below("sys/class/block", subsystem))
    return sorted(found)


def _storage(look: Look, bdf: Bdf) -> Iterator[str]:
    sysfs = look.sysfs
    names = block_devices(look, bdf)
    if not names:
        return
    busy = set()
    by_number = {sysfs.text("sys/class/block", name, "dev"): name for name in names}
    for line in (sysfs.text("proc/self/mountinfo") or "").splitlines():
        fields = line.split()
        source = fields[fields.index("-") + 2] if "-" in fields else ""
        # btrfs shows a number of its own: then the source tells.
        name = by_number.get(fields[2]) or (Path(source).name if source.startswith("/dev/") else "")
        if name in names and name not in busy:
            busy.add(name)
            yield f"/dev/{name} is mounted at {_unescape(fields[4])}"
    for line in (sysfs.text("proc/swaps") or "").splitlines()[1:]:
        name = sysfs.path(line.split()[0].lstrip("/")).resolve().name
        if name in names:
            busy.add(name)
            yield f"/dev/{name} is swap"
    for name in names:
        for holder in sysfs.names("sys/class/block", name, "holders"):
            label = sysfs.text("sys/class/block", holder, "dm", "name") or holder
            busy.add(name)
            yield f"/dev/{name} is held by {label}"
    if not busy:
        yield from (f"/dev/{name} is claimed by the kernel" for name in names if _claimed(sysfs, name))


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks in mountinfo (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _claimed(sysfs: Sysfs, name: str) -> bool:
    """Whether somebody has the block device exclusively: mounted in another namespace, ZFS, bcache (open(2))."""
    try:
        os.close(os.open(sysfs.path("dev", name), os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _network(look: Look, bdf: Bdf) -> Iterator[str]:
    sysfs = look.sysfs
    routed = _default_route_interfaces(sysfs)
    for name in look.below("sys/class/net", bdf):
        seen = {name}
        queue = [name]
        while queue:  # the route may lie on a bond, a bridge or a VLAN above
            current = queue.pop()
            if current in routed:
                via = "" if current == name else f" (through {current})"
                yield f"the default route goes through {name}{via}"
                break
            uppers = [
                entry.removeprefix("upper_")
                for entry in sysfs.names("sys/class/net", current)
                if entry.startswith("upper_")
            ]
            queue += [upper for upper in uppers if upper not in seen]
            seen.update(uppers)


def _default_route_interfaces(sysfs: Sysfs) -> set[str]:
    found = set()
    for line in (sysfs.text("proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" and fields[7] == "00000000":
            found.add(fields[0])
    for line in (sysfs.text("proc/net/ipv6_route") or "").splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00":
            found.add(fields[9])
    return found - {"lo"}


def _open_nodes(look: Look, bdf: Bdf) -> Iterator[str]:
    nodes = {f"/dev/{name}" for name in block_devices(look, bdf)}
    for number in look.below("sys/dev/char", bdf):
        uevent = look.sysfs.text("sys/dev/char", number, "uevent") or ""
        for line in uevent.splitlines():
            key, _, value = line.partition("=")
            if key == "DEVNAME" and not value.startswith("vfio/"):
                nodes.add(f"/dev/{value}")
    for node, who in sorted(look.holders(nodes).items()):
        yield f"{node} is open in {' and '.join(map(str, who))}"
