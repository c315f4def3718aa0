"""What happens to devices, drivers and groups, while it happens: the kernel's uevents.

From the kernel itself (a netlink socket of libudev), because udevd need not run; so nothing of udev's rules has been
done yet when an event arrives. Sources: drivers/base/core.c (dev_uevent), drivers/base/dd.c (bind, unbind),
drivers/pci/pci-driver.c (pci_uevent, pci_uevent_ers), drivers/vfio/group.c (one device for each group).
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kvmpass.errors import HostNotReady
from kvmpass.host.address import Bdf
from kvmpass.host.names import Names
from kvmpass.host.sysfs import PCI_DEVICES, Sysfs
from kvmpass.host.view.filters import Filter, parse_filter

Kind = Literal[
    "device-added",
    "device-removed",
    "device-changed",
    "driver-bound",
    "driver-unbound",
    "group-appeared",
    "group-vanished",
    "events-lost",
]

_DEVICE_KINDS: Mapping[str, Kind] = {
    "add": "device-added",
    "remove": "device-removed",
    "change": "device-changed",
    "bind": "driver-bound",
    "unbind": "driver-unbound",
}
_GROUP_KINDS: Mapping[str, Kind] = {"add": "group-appeared", "remove": "group-vanished"}

# What a uevent of any PCI device says, as opposed to what changed (drivers/pci/pci-driver.c: pci_uevent).
_IDENTITY = frozenset({"ACTION", "DEVPATH", "SUBSYSTEM", "SEQNUM", "DRIVER", "MODALIAS", "SYNTH_UUID"})

TICK = 0.5  # seconds between two questions whether to go on


class Uevent(NamedTuple):
    action: str
    subsystem: str
    properties: Mapping[str, str]


Source = Callable[[float], Uevent | None]
"""Waits so many seconds for the next event; None if there is none. Raises ``OSError`` (ENOBUFS: some are lost)."""


@dataclass(frozen=True, slots=True)
class HostEvent:
    """``time`` is when it arrived here, in seconds since 1970; the kernel gives none.

    ``bdf`` is None for groups and lost events. ``driver`` is the one that took the device, or let go of it. ``group``
    is that of the device; group events tell of its node ``/dev/vfio/GROUP``, which exists while VFIO has a device of
    it. ``devices`` are the group's. ``detail`` says what changed, as ``KEY=value`` words of the kernel's.
    """

    time: float
    kind: Kind
    bdf: Bdf | None = None
    vendor: int = 0
    device: int = 0
    driver: str | None = None
    group: int | None = None
    devices: tuple[Bdf, ...] = ()
    detail: str | None = None


class _Known(NamedTuple):
    """What a filter looks at, of a device that may have gone."""

    bdf: Bdf
    vendor: int
    device: int
    driver: str | None


def watch_events(
    sysfs: Sysfs | None = None,
    filters: Iterable[str] = (),
    *,
    timeout: float | None = None,
    until: Callable[[], bool] | None = None,
    source: Source | None = None,
) -> Iterator[HostEvent]:
    """Every event from the moment of this call on, as an iterator that waits for the next one.

    ``filters`` are those of :func:`select`, looked at when the event arrives: a device that does not exist yet can
    be named. It ends after ``timeout`` seconds, or when ``until`` (asked about twice a second) says so. ``source``
    stands in for the kernel in tests. Needs no rights. Raises ``HostNotReady`` without libudev, ``OSError``.
    """
    sysfs = sysfs or Sysfs()
    watcher = _Watcher(sysfs, tuple(filters), source or _netlink())
    deadline = None if timeout is None else time.monotonic() + timeout
    return watcher.events(deadline, until)


def _netlink() -> Source:
    try:
        import pyudev  # type: ignore[import-untyped]

        monitor: Any = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    except ImportError as error:  # pyudev's own word for a missing libudev, too
        raise HostNotReady(f"events cannot be watched: {error}", "install libudev (Debian: libudev1)") from error
    for subsystem in ("pci", "vfio"):
        monitor.filter_by(subsystem)
    monitor.start()

    def wait(seconds: float) -> Uevent | None:
        device = monitor.poll(max(seconds, 0.001))  # in whole milliseconds
        if device is None:
            return None
        return Uevent(device.action, device.subsystem, dict(device.properties))

    return wait


class _Watcher:
    """Remembers of each device what its last event will not say: driver and group are gone by then."""

    def __init__(self, sysfs: Sysfs, filters: tuple[str, ...], source: Source) -> None:
        self._sysfs = sysfs
        self._source = source
        self._names = Names(sysfs)
        self._filters = [self._parse(text) for text in filters]
        self._drivers: dict[Bdf, str | None] = {}
        self._groups: dict[Bdf, int | None] = {}
        for device in sysfs.devices():
            self._drivers[device.bdf], self._groups[device.bdf] = device.driver, device.group

    def events(self, deadline: float | None, until: Callable[[], bool] | None) -> Iterator[HostEvent]:
        while until is None or not until():
            left = TICK if deadline is None else min(deadline - time.monotonic(), TICK)
            if left <= 0:
                return
            try:
                uevent = self._source(left)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield HostEvent(time.time(), "events-lost")
                continue
            event = self._event(uevent) if uevent else None
            if event is not None:
                yield event

    def _event(self, uevent: Uevent) -> HostEvent | None:
        """The event that is meant for whoever asked, or None."""
        if uevent.subsystem == "vfio":
            return self._group_event(uevent)
        kind = _DEVICE_KINDS.get(uevent.action)
        name = uevent.properties.get("PCI_SLOT_NAME")
        if uevent.subsystem != "pci" or kind is None or name is None:
            return None
        bdf = Bdf.parse(name)
        vendor, device = _ids(uevent.properties.get("PCI_ID", ""))
        before = self._drivers.get(bdf)
        driver = uevent.properties.get("DRIVER")
        group = self._sysfs.link(PCI_DEVICES, name, "iommu_group")
        if group is not None and group.isdecimal():
            self._groups[bdf] = int(group)
        event = HostEvent(
            time=time.time(),
            kind=kind,
            bdf=bdf,
            vendor=vendor,
            device=device,
            driver=before if kind == "driver-unbound" else driver,
            group=self._groups.get(bdf),
            detail=_detail(uevent.properties) if kind == "device-changed" else None,
        )
        wanted = self._wanted(_Known(bdf, vendor, device, driver or before))
        if kind == "device-removed":
            self._drivers.pop(bdf, None)
            self._groups.pop(bdf, None)
        elif kind != "device-changed":
            self._drivers[bdf] = driver
        return event if wanted else None

    def _group_event(self, uevent: Uevent) -> HostEvent | None:
        kind = _GROUP_KINDS.get(uevent.action)
        node = re.fullmatch(r"(?:/dev/)?vfio/(?:noiommu-)?(\d+)", uevent.properties.get("DEVNAME", ""))
        if kind is None or node is None:
            return None
        number = int(node[1])
        members = sorted(bdf for bdf, group in self._groups.items() if group == number)
        event = HostEvent(time=time.time(), kind=kind, group=number, devices=tuple(members))
        known = [self._known(bdf) for bdf in members]
        return event if not self._filters or any(self._wanted(one) for one in known) else None

    def _known(self, bdf: Bdf) -> _Known:
        base = (PCI_DEVICES, str(bdf))
        vendor, device = self._sysfs.number(*base, "vendor"), self._sysfs.number(*base, "device")
        return _Known(bdf, vendor or 0, device or 0, self._drivers.get(bdf))

    def _parse(self, text: str) -> Filter:
        return parse_filter(self._sysfs, text, lambda one: self._names.of_ids(one.bdf, one.vendor, one.device))

    def _wanted(self, one: _Known) -> bool:
        """A name (``eth0``) may stand for a device only before the event, or only after it."""
        if not self._filters:
            return True
        now = [self._parse(filter_.text) for filter_ in self._filters]
        return any(filter_.matches(one) for filter_ in (*self._filters, *now))


def _ids(text: str) -> tuple[int, int]:
    vendor, _, device = text.partition(":")
    try:
        return int(vendor, 16), int(device, 16)
    except ValueError:
        return 0, 0


def _detail(properties: Mapping[str, str]) -> str | None:
    words = [f"{key}={value}" for key, value in sorted(properties.items()) if not _is_identity(key)]
    return " ".join(words) or None


def _is_identity(key: str) -> bool:
    return key in _IDENTITY or key.startswith(("PCI_", "ID_")) or key == "USEC_INITIALIZED"
