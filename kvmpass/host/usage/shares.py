"""File systems of a device itself: 9p and virtio-fs, flash memory."""

from __future__ import annotations

from collections.abc import Iterator

from kvmpass.host.look import Look
from kvmpass.host.sysfs import PciDevice
from kvmpass.host.usage import Use

VIRTIO = "sys/bus/virtio/devices"
_TAGS = "sys/fs/virtiofs"  # since Linux 6.9


def shares(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield mounts of its file systems. Unbinding its driver blocks until they end (net/9p/trans_virtio.c)."""
    for name in look.below(VIRTIO, device.bdf):
        driver = look.sysfs.link(VIRTIO, name, "driver")
        if driver == "9pnet_virtio":
            tag = look.sysfs.text(VIRTIO, name, "mount_tag")
            yield from _mounts(look, "9p", None if tag is None else tag.rstrip("\0"))  # sysfs has its terminator
        elif driver == "virtiofs":
            yield from _mounts(look, "virtiofs", _virtiofs_tag(look, name))
    for name in look.below("sys/class/mtd", device.bdf):
        yield from _flash(look, name)


def _mounts(look: Look, kind: str, tag: str | None) -> Iterator[Use]:
    """``tag`` is the source of the mount, None if unknown."""
    mounts = [mount for mount in look.mounts if mount.kind == kind and "trans=tcp" not in mount.options]
    words = {"9p": "9p", "virtiofs": "virtio-fs"}[kind]
    found = [mount for mount in mounts if tag in (None, mount.source)]
    for mount in found[:1]:
        doubt = "" if tag else ", probably (this kernel does not show tags)"
        yield Use(f"its {words} ({mount.source}) is mounted at {mount.point}{mount.where}{doubt}", waits=True)
    if not found and kind == "9p":
        # Each superblock has one, even if its mount is not visible: below an overlay, in a namespace of another user.
        alive = [name for name in look.sysfs.names("sys/class/bdi") if name.startswith("9p-")]
        if len(alive) > len({mount.number for mount in mounts}):
            yield Use(f"a {words} is mounted where it is not visible, probably its own ({tag})", waits=True)


def _virtiofs_tag(look: Look, name: str) -> str | None:
    for number in look.sysfs.names(_TAGS):
        if look.sysfs.link(_TAGS, number, "device") == name:
            return look.sysfs.text(_TAGS, number, "tag")
    return None


def _flash(look: Look, name: str) -> Iterator[Use]:
    number = name.removeprefix("mtd")
    if not number.isdecimal():  # the read-only node of the same
        return
    for mount in look.mounts:  # drivers/mtd/mtdsuper.c: by name or by number
        if mount.source in (name, f"/dev/mtdblock{number}") or mount.number == f"31:{number}":
            yield Use(f"its flash memory {name} is mounted at {mount.point}{mount.where}")
    for volume in look.sysfs.names("sys/class/ubi"):
        if look.sysfs.text("sys/class/ubi", volume, "mtd_num") == number:
            yield Use(f"its flash memory {name} is held by {volume}")
