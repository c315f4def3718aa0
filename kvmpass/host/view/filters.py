"""What people type for devices: addresses, ids, interfaces, disks, drivers, patterns."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Protocol

from kvmpass.errors import BadAddress, NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.names import Names
from kvmpass.host.sysfs import PCI_DRIVERS, PciDevice, Sysfs

HELP = (
    "an address (0000:01:00.0), a part of it (00.0, 01:00), ids (10de:2204), a network interface (eth0), a disk "
    "(nvme0n1, /dev/sda1), a driver (nvme) or a pattern ('*nvme*') selects devices; kvmpass list shows all"
)

_SLOT = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([01][0-9a-fA-F])")
# As lspci -s takes them.
_PART = re.compile(r"(?:(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):)?([01]?[0-9a-fA-F])\.([0-7])")
_IDS = re.compile(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


class Candidate(Protocol):
    """What a filter looks at: a :class:`PciDevice`, or what an event says of one that has gone."""

    @property
    def bdf(self) -> Bdf: ...
    @property
    def vendor(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def driver(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Filter:
    """``meaning`` is what a text was taken for, in words; ``matches`` says whether a device is meant."""

    text: str
    meaning: str
    matches: Callable[[Candidate], bool]


def parse_filter(sysfs: Sysfs, text: str, name: Callable[[PciDevice], str] | None = None) -> Filter:
    """What ``text`` stands for on this host at this moment. Never fails: a word that is nothing else is a driver's.

    Bus and device have two digits (``01:00``), vendor and device four (``10de:2204``); before a function one digit is
    enough, without a bus all are meant (``5.0``). A disk or interface that lies on others (LVM, bond, bridge) stands
    for all devices below. ``name`` gives patterns the device's name to look at.
    """
    text = text.strip()
    try:
        return Filter(text, f"the address {(bdf := Bdf.parse(text))}", lambda one: one.bdf == bdf)
    except BadAddress:
        pass
    if slot := _SLOT.fullmatch(text):
        place = (int(slot[1] or "0", 16), int(slot[2], 16), int(slot[3], 16))
        words = "all functions of slot {:04x}:{:02x}:{:02x}".format(*place)
        return Filter(text, words, lambda one: (one.bdf.domain, one.bdf.bus, one.bdf.device) == place)
    if part := _PART.fullmatch(text):
        return _part(text, *(None if digits is None else int(digits, 16) for digits in part.groups()))
    if ids := _IDS.fullmatch(text):
        pair = (int(ids[1], 16), int(ids[2], 16))
        words = "vendor {:04x}, device {:04x}".format(*pair)
        return Filter(text, words, lambda one: (one.vendor, one.device) == pair)
    if text.startswith("/dev/"):
        return _among(text, f"the device node {text}", _behind_node(sysfs, text))
    if any(character in text for character in "*?["):
        return Filter(text, "a pattern for addresses, ids, drivers and names", partial(_fits, text.lower(), name))
    plain = text not in ("", ".", "..") and "/" not in text
    if plain and sysfs.path("sys/class/net", text).exists():
        return _among(text, f"the network interface {text}", _behind(sysfs, "sys/class/net", text, "lower_"))
    if plain and sysfs.path("sys/class/block", text).exists():
        return _among(text, f"the block device {text}", _behind(sysfs, "sys/class/block", text, "slaves/"))
    words = "a driver, as there is no network interface and no disk of that name"
    if plain and sysfs.path(PCI_DRIVERS, text).is_dir():
        words = f"the driver {text}"
    return Filter(text, words, lambda one: one.driver is not None and _same(one.driver, text))


def _part(text: str, *part: int | None) -> Filter:
    """A part of an address: domain, bus (None: any), device and function."""
    _, bus, device, function = part
    place = "any bus" if bus is None else f"bus {bus:02x}"

    def matches(one: Candidate) -> bool:
        there = (one.bdf.domain, one.bdf.bus, one.bdf.device, one.bdf.function)
        return all(wanted in (None, number) for wanted, number in zip(part, there, strict=True))

    return Filter(text, f"device {device:02x}, function {function} of {place}", matches)


def select(sysfs: Sysfs, filters: Iterable[str], names: Names | None = None) -> list[PciDevice]:
    """The devices that any of ``filters`` selects, by address; all devices where there is no filter.

    Raises ``NoSuchDevice`` for a filter that selects none, with what it was taken for.
    """
    names = names or Names(sysfs)
    devices = sysfs.devices()
    wanted = [parse_filter(sysfs, text, names.of) for text in filters]
    for one in wanted:
        if not any(one.matches(device) for device in devices):
            raise NoSuchDevice(f"no PCI device matches {one.text!r}, taken for {one.meaning}", HELP)
    return [device for device in devices if not wanted or any(one.matches(device) for one in wanted)]


def _among(text: str, meaning: str, bdfs: set[Bdf]) -> Filter:
    return Filter(text, meaning if bdfs else f"{meaning}, which is not on a PCI device", lambda one: one.bdf in bdfs)


def _same(one: str, other: str) -> bool:
    """Drivers are written with dashes or underscores, as modules are."""
    return one.replace("-", "_") == other.replace("-", "_")


def _fits(pattern: str, name: Callable[[PciDevice], str] | None, one: Candidate) -> bool:
    texts = [str(one.bdf), f"{one.vendor:04x}:{one.device:04x}", one.driver or ""]
    if name is not None and isinstance(one, PciDevice):
        texts.append(name(one))
    return any(fnmatchcase(text.lower(), pattern) for text in texts)


# --- from what the kernel makes of a device back to the device


def _behind_node(sysfs: Sysfs, node: str) -> set[Bdf]:
    path = os.path.realpath(sysfs.path(node.lstrip("/")))  # /dev/disk/by-id has links
    place = os.path.relpath(path, os.path.realpath(sysfs.path("dev")))
    if re.fullmatch(r"vfio/\d+", place):
        members = sysfs.names("sys/kernel/iommu_groups", place.removeprefix("vfio/"), "devices")
        return {Bdf.parse(member) for member in members if _ADDRESS.fullmatch(member)}
    if sysfs.path("sys/class/block", place).exists():
        return _behind(sysfs, "sys/class/block", place, "slaves/")
    for number in sysfs.names("sys/dev/char"):
        uevent = sysfs.text("sys/dev/char", number, "uevent") or ""
        if f"DEVNAME={place}" in uevent.splitlines():
            return _functions(sysfs, sysfs.path("sys/dev/char", number))
    return set()


def _behind(sysfs: Sysfs, listing: str, name: str, below: str) -> set[Bdf]:
    """The functions behind ``name``, or behind what it lies on: links ``lower_*``, names in ``slaves/``."""
    found, seen, queue = set[Bdf](), {name}, [name]
    while queue:
        current = queue.pop()
        found |= _functions(sysfs, sysfs.path(listing, current))
        lower = set(_lower(sysfs, listing, current, below)) - seen
        seen |= lower
        queue += lower
    return found


def _lower(sysfs: Sysfs, listing: str, name: str, below: str) -> Iterator[str]:
    if below.endswith("/"):
        yield from sysfs.names(listing, name, below)
        # A partition lies on what its whole disk lies on.
        yield from sysfs.names(listing, sysfs.path(listing, name).resolve().parent.name, below)
    else:
        yield from (x.removeprefix(below) for x in sysfs.names(listing, name) if x.startswith(below))


def _functions(sysfs: Sysfs, link: os.PathLike[str]) -> set[Bdf]:
    """The PCI function nearest above a device; with native multipath an NVMe namespace can have several."""
    parts = os.path.realpath(link).split("/")
    subsystem = next((part for part in parts if re.fullmatch(r"nvme-subsys\d+", part)), None)
    if subsystem is not None:
        controllers = sysfs.names("sys/class/nvme-subsystem", subsystem)
        links = [sysfs.path("sys/class/nvme-subsystem", subsystem, one) for one in controllers]
        return {bdf for one in links for bdf in _functions_above(one)}
    return _functions_above(link)


def _functions_above(link: os.PathLike[str]) -> set[Bdf]:
    addresses = [part for part in os.path.realpath(link).split("/") if _ADDRESS.fullmatch(part)]
    return {Bdf.parse(addresses[-1])} if addresses else set()
