"""Device filters: addresses, IDs, network interfaces, disks, drivers, patterns."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern
from kvmpass.errors import BadAddress, NoSuchDevice
from kvmpass.host.address import Bdf, on_path
from kvmpass.host.names import Names
from kvmpass.host.sysfs import PCI_DRIVERS, PciDevice, Sysfs

HELP = (
    "name an address (0000:01:00.0), a part of it (00.0, 01:00), ids (10de:2204), a network interface (eth0), a disk "
    "(nvme0n1, /dev/sda1), a driver (nvme) or a pattern ('*nvme*'); kvmpass list shows all devices"
)

_SLOT = lazy_pattern(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([01][0-9a-fA-F])")
# The same as lspci -s.
_PART = lazy_pattern(r"(?:(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):)?([01]?[0-9a-fA-F])\.([0-7])")
_IDS = lazy_pattern(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")


class EventDevice(NamedTuple):
    """The device of an event, which may be removed already."""

    bdf: Bdf
    """Its address."""
    vendor: int
    """Vendor ID, 16 bits."""
    device: int
    """Device ID, 16 bits."""
    driver: str | None
    """The driver it is bound to; None without one."""


Candidate = PciDevice | EventDevice
"""What a filter matches."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter as :func:`parse_filter` has read it."""

    text: str
    """The text that was parsed."""
    meaning: str
    """What the text was interpreted as, for messages."""
    matches: Callable[[Candidate], bool]
    """Whether the filter selects a device."""


def parse_filter(sysfs: Sysfs, text: str, names: Names) -> Filter:
    """Parse ``text`` as a filter for this host at this moment. Raises nothing: any other word is a driver's name.

    Bus and device have two digits (``01:00``), vendor and device IDs four (``10de:2204``); before a function one
    digit is enough, and without a bus all buses match (``5.0``). A disk or interface on top of others (LVM, bond,
    bridge) selects all devices below it. ``names`` are those that patterns match.
    """
    text = text.strip()
    try:
        return Filter(text, f"the address {(bdf := Bdf.parse(text))}", lambda device: device.bdf == bdf)
    except BadAddress:
        pass
    if slot := _SLOT.fullmatch(text):
        place = (int(slot[1] or "0", 16), int(slot[2], 16), int(slot[3], 16))
        words = "all functions of slot {:04x}:{:02x}:{:02x}".format(*place)
        return Filter(text, words, lambda device: (device.bdf.domain, device.bdf.bus, device.bdf.device) == place)
    if part := _PART.fullmatch(text):
        return _part(text, *(None if digits is None else int(digits, 16) for digits in part.groups()))
    if ids := _IDS.fullmatch(text):
        pair = (int(ids[1], 16), int(ids[2], 16))
        words = "vendor {:04x}, device {:04x}".format(*pair)
        return Filter(text, words, lambda device: (device.vendor, device.device) == pair)
    if text.startswith("/dev/"):
        return _among(text, f"the device node {text}", _behind_node(sysfs, text))
    if any(character in text for character in "*?["):
        return Filter(text, "a pattern for addresses, IDs, drivers and names", partial(_fits, text.lower(), names))
    plain = text not in ("", ".", "..") and "/" not in text
    if plain and sysfs.path("sys/class/net", text).exists():
        return _among(text, f"the network interface {text}", _behind(sysfs, "sys/class/net", text, "lower_"))
    if plain and sysfs.path("sys/class/block", text).exists():
        return _among(text, f"the block device {text}", _behind(sysfs, "sys/class/block", text, "slaves/"))
    words = "a driver: no network interface and no disk has that name"
    if plain and sysfs.path(PCI_DRIVERS, text).is_dir():
        words = f"the driver {text}"
    return Filter(text, words, lambda device: device.driver is not None and _same(device.driver, text))


def _part(text: str, *part: int | None) -> Filter:
    """Return a part of an address: domain, bus (None: any), device and function."""
    _, bus, device, function = part
    place = "any bus" if bus is None else f"bus {bus:02x}"

    def matches(candidate: Candidate) -> bool:
        bdf = candidate.bdf
        numbers = (bdf.domain, bdf.bus, bdf.device, bdf.function)
        return all(wanted in (None, number) for wanted, number in zip(part, numbers, strict=True))

    return Filter(text, f"device {device:02x}, function {function} of {place}", matches)


def select(sysfs: Sysfs, filters: Iterable[str], names: Names | None = None) -> list[PciDevice]:
    """Return the devices that any of ``filters`` selects, by address; all devices without a filter.

    Raises ``NoSuchDevice`` for a filter that selects none, with its interpretation.
    """
    names = names or Names(sysfs)
    devices = sysfs.devices()
    wanted = [parse_filter(sysfs, text, names) for text in filters]
    for item in wanted:
        if not any(item.matches(device) for device in devices):
            raise NoSuchDevice(f"no PCI device matches {item.text!r}, interpreted as {item.meaning}", HELP)
    return [device for device in devices if not wanted or any(item.matches(device) for item in wanted)]


def _among(text: str, meaning: str, bdfs: set[Bdf]) -> Filter:
    return Filter(
        text, meaning if bdfs else f"{meaning}, which is not on a PCI device", lambda device: device.bdf in bdfs
    )


def _same(first: str, second: str) -> bool:
    """Whether two driver names are the same: dashes and underscores are equivalent, as in module names."""
    return first.replace("-", "_") == second.replace("-", "_")


def _fits(pattern: str, names: Names, candidate: Candidate) -> bool:
    bdf, vendor, device = candidate.bdf, candidate.vendor, candidate.device
    texts = [str(bdf), f"{vendor:04x}:{device:04x}", candidate.driver or "", names.of_ids(bdf, vendor, device)]
    return any(fnmatchcase(text.lower(), pattern) for text in texts)


# --- from a node, an interface or a disk to its PCI functions


def _behind_node(sysfs: Sysfs, node: str) -> set[Bdf]:
    path = os.path.realpath(sysfs.path(node.lstrip("/")))  # /dev/disk/by-id has links
    place = os.path.relpath(path, os.path.realpath(sysfs.path("dev")))
    if re.fullmatch(r"vfio/\d+", place):
        members = sysfs.names("sys/kernel/iommu_groups", place.removeprefix("vfio/"), "devices")
        return set(on_path("/".join(members)))
    if sysfs.path("sys/class/block", place).exists():
        return _behind(sysfs, "sys/class/block", place, "slaves/")
    for number in sysfs.names("sys/dev/char"):
        if f"DEVNAME={place}" in sysfs.lines("sys/dev/char", number, "uevent"):
            return _functions(sysfs, sysfs.path("sys/dev/char", number))
    return set()


def _behind(sysfs: Sysfs, listing: str, name: str, below: str) -> set[Bdf]:
    """Return the functions of ``name``, or of what it is on top of: links ``lower_*``, names in ``slaves/``."""
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
        # A partition is on top of what its whole disk is on top of.
        yield from sysfs.names(listing, sysfs.path(listing, name).resolve().parent.name, below)
    else:
        yield from (entry.removeprefix(below) for entry in sysfs.names(listing, name) if entry.startswith(below))


def _functions(sysfs: Sysfs, link: os.PathLike[str]) -> set[Bdf]:
    """Return the PCI function nearest above a device; with native multipath an NVMe namespace can have several."""
    places = [os.path.realpath(link)]
    if subsystem := re.search(r"/(nvme-subsys\d+)(?:/|$)", places[0]):
        base = ("sys/class/nvme-subsystem", subsystem[1])
        places = [os.path.realpath(sysfs.path(*base, controller)) for controller in sysfs.names(*base)]
    return {bdf for place in places for bdf in on_path(place)[-1:]}
