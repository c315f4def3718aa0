"""Disks of a device, and storage functions whose disks are not visible."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kvmpass.host.address import Bdf
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PciDevice, Sysfs
from kvmpass.host.usage import Use

_STORAGE = 0x01  # base class
_NEW_SECONDS, _SCAN_SECONDS = 10.0, 1.0  # how long a disk is new, and how long its partitions are read at most
# What an in-tree driver registers below its function, even if no disk is attached.
_SUBSYSTEMS = ("ata_port", "scsi_host", "nvme", "mmc_host", "mtd", "fc_host")
# Drivers whose disks are below their functions. Others (rcbottom of AMD-RAID, for example) register them elsewhere,
# or members of arrays not at all.
_SHOWS_DISKS = ("ahci", "ata_", "pata_", "sata_", "nvme", "virtio-pci", "vmd", "sdhci", "mpt", "megaraid", "hpsa")
# In-tree drivers for functions of other kinds: bound by hand, and then idle.
_NO_STORAGE = ("pci-stub", "uio_", "e1000", "igb", "ixgbe", "xhci_hcd", "ehci", "snd_", "amdgpu")


def block_devices(look: Look, bdf: Bdf) -> list[str]:
    """Return the disks and partitions of a function, such as ``nvme0n1`` and ``nvme0n1p1``."""
    found = set(look.below("sys/class/block", bdf))
    # With native multipath the namespaces are below the NVMe subsystem, not below the controller.
    for controller in look.below("sys/class/nvme", bdf):
        for subsystem in look.nvme_subsystems.get(controller, ()):
            found.update(look.below("sys/class/block", subsystem))
    return sorted(found)


def storage(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield disks that are mounted, swap, held (LVM, md, dm-crypt), members of a btrfs, claimed; or not visible."""
    names = block_devices(look, device.bdf)
    if not names:
        yield from _elsewhere(look, device)
        return
    busy = set()
    for name, text in _known(look, names):
        busy.add(name)
        yield Use(text)
    if not busy:
        claimed = (name for name in names if _claimed(look.sysfs, name))
        yield from (Use(f"/dev/{name} is claimed by the kernel") for name in claimed)


def _known(look: Look, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield a name and what uses it, for each use that the kernel shows."""
    sysfs = look.sysfs
    by_number = {number: name for name in names if (number := sysfs.text("sys/class/block", name, "dev"))}
    mounted = set()
    for mount in look.mounts:
        # btrfs has a device number of its own: then the source counts.
        name = by_number.get(mount.number)
        if name is None and mount.source.startswith("/dev/"):
            name = Path(mount.source).name
        if name in names and name not in mounted:
            mounted.add(name)
            yield name, f"/dev/{name} is mounted at {mount.point}{mount.where}"
    for line in (look.text("proc/swaps") or "").splitlines()[1:]:
        name = os.path.basename(os.path.realpath(sysfs.path(line.split()[0].lstrip("/"))))  # noqa: PTH119
        if name in names:
            yield name, f"/dev/{name} is swap"
    for name in names:
        for holder in sysfs.names("sys/class/block", name, "holders"):
            label = sysfs.text("sys/class/block", holder, "dm", "name") or holder
            yield name, f"/dev/{name} is held by {label}"
    for name in sorted(look.btrfs_members.intersection(names) - mounted):  # only one of them is among the mounts
        yield name, f"/dev/{name} belongs to a mounted btrfs"


def _claimed(sysfs: Sysfs, name: str) -> bool:
    """Whether the block device is claimed: mounted in another namespace, ZFS, bcache (O_EXCL in open(2))."""
    return sysfs.ask(f"claimed {name}", lambda: _claimed_now(sysfs, name))


def _claimed_now(sysfs: Sysfs, name: str) -> bool:
    """Whether it cannot be claimed; a new disk is asked again for a second: to read its partitions claims it."""
    path = sysfs.path("dev", name)
    ends = 0.0
    while True:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY:
                return False
        else:
            return False
        if not ends:
            ends = time.monotonic() + (_SCAN_SECONDS if _is_new(path) else 0.0)
        if time.monotonic() >= ends:
            return True
        time.sleep(0.02)


def _is_new(path: Path) -> bool:
    """Whether a node was made a short while ago."""
    try:
        return abs(time.time() - path.stat().st_ctime) < _NEW_SECONDS
    except OSError:
        return False


def _elsewhere(look: Look, device: PciDevice) -> Iterator[Use]:
    if (
        device.class_code >> 16 != _STORAGE
        or device.driver is None
        or device.driver.startswith(_SHOWS_DISKS + _NO_STORAGE)
    ):
        return
    if any(look.below(f"sys/class/{name}", device.bdf) for name in _SUBSYSTEMS):
        return
    yield Use(
        f"its driver, {device.driver}, shows no disk: its disks may be members of an array that is shown elsewhere",
        seen=False,
    )
