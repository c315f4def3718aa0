"""Events of devices, drivers and IOMMU groups: the kernel's uevents.

Received from the kernel (a netlink socket of libudev), because udevd need not run; so udev has not processed its
rules yet when an event arrives. Sources: drivers/base/core.c (dev_uevent), drivers/base/dd.c (bind, unbind),
drivers/pci/pci-driver.c (pci_uevent, pci_uevent_ers), drivers/vfio/group.c (one device for each group).
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from kvmpass._dataclass import dataclass
from kvmpass.errors import HostNotReady
from kvmpass.host.address import Bdf
from kvmpass.host.names import Names
from kvmpass.host.sysfs import PCI_DEVICES, Sysfs
from kvmpass.host.view.filters import EventDevice, Filter, parse_filter

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

# Properties of every PCI uevent, as opposed to what has changed (drivers/pci/pci-driver.c: pci_uevent).
_IDENTITY = frozenset({"ACTION", "DEVPATH", "SUBSYSTEM", "SEQNUM", "DRIVER", "MODALIAS", "SYNTH_UUID"})

TICK = 0.5  # seconds between two calls of ``until``


Uevent = Mapping[str, str]
"""The environment variables of one uevent of the kernel: ``ACTION``, ``SUBSYSTEM`` (``pci`` or ``vfio``) …"""

Source = Callable[[float], Uevent | None]
"""Waits that many seconds for the next event; None without one. Raises ``OSError`` (ENOBUFS: events were lost)."""


@dataclass(frozen=True, slots=True)
class HostEvent:
    """One event of a device or an IOMMU group."""

    time: float
    """When it was received, in seconds since 1970; the kernel sends no time."""
    kind: Kind
    """What has happened. The ``group-`` events are those of the node ``/dev/vfio/GROUP``."""
    bdf: Bdf | None = None
    """The device; None for groups and lost events."""
    vendor: int = 0
    """Vendor ID; 0 for groups and lost events."""
    device: int = 0
    """Device ID; 0 for groups and lost events."""
    driver: str | None = None
    """The driver that was bound or unbound; None if there is none."""
    group: int | None = None
    """The device's IOMMU group, or the group of a group event."""
    devices: tuple[Bdf, ...] = ()
    """The devices of the group, of a group event."""
    detail: str | None = None
    """What has changed (``device-changed``): the kernel's properties, as ``KEY=value``."""


def watch_events(
    sysfs: Sysfs | None = None,
    filters: Iterable[str] = (),
    *,
    timeout: float | None = None,
    until: Callable[[], bool] | None = None,
    source: Source | None = None,
) -> Iterator[HostEvent]:
    """Yield every event from the moment of this call on; the iterator blocks until the next one.

    ``filters`` are those of :func:`select`, evaluated when an event arrives, so they can name a device that does not
    exist yet. Ends after ``timeout`` seconds, or when ``until`` (called about twice a second) returns true.
    ``source`` replaces the kernel in tests. Needs no privileges. Raises ``OSError``, and
    ``HostNotReady`` without libudev.

    Synchronization: the iterator is for one thread.
    """
    sysfs = sysfs or Sysfs()
    watcher = _Watcher(sysfs, tuple(filters), source or _netlink())
    deadline = None if timeout is None else time.monotonic() + timeout
    return watcher.events(deadline, until)


def _netlink() -> Source:
    try:
        import pyudev  # type: ignore[import-untyped]

        monitor: Any = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    except ImportError as error:  # pyudev raises it for a missing libudev, too
        raise HostNotReady(f"cannot receive uevents: {error}", "install libudev (Debian: libudev1)") from error
    for subsystem in ("pci", "vfio"):
        monitor.filter_by(subsystem)
    monitor.start()

    def wait(seconds: float) -> Uevent | None:
        device = monitor.poll(max(seconds, 0.001))  # in whole milliseconds
        return None if device is None else dict(device.properties)

    return wait


class _Watcher:
    """Keeps each device's driver and group: a ``remove`` or ``unbind`` event does not have them."""

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
        """Return the event, or None if the filters do not select it."""
        if uevent["SUBSYSTEM"] == "vfio":
            return self._group_event(uevent)
        kind = _DEVICE_KINDS.get(uevent["ACTION"])
        name = uevent.get("PCI_SLOT_NAME")
        if uevent["SUBSYSTEM"] != "pci" or kind is None or name is None:
            return None
        bdf = Bdf.parse(name)
        vendor, device = _ids(uevent.get("PCI_ID", ""))
        before = self._drivers.get(bdf)
        driver = uevent.get("DRIVER")
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
            detail=_detail(uevent) if kind == "device-changed" else None,
        )
        wanted = self._wanted(EventDevice(bdf, vendor, device, driver or before))
        if kind == "device-removed":
            self._drivers.pop(bdf, None)
            self._groups.pop(bdf, None)
        elif kind != "device-changed":
            self._drivers[bdf] = driver
        return event if wanted else None

    def _group_event(self, uevent: Uevent) -> HostEvent | None:
        kind = _GROUP_KINDS.get(uevent["ACTION"])
        node = re.fullmatch(r"(?:/dev/)?vfio/(?:noiommu-)?(\d+)", uevent.get("DEVNAME", ""))
        if kind is None or node is None:
            return None
        number = int(node[1])
        members = sorted(bdf for bdf, group in self._groups.items() if group == number)
        event = HostEvent(time=time.time(), kind=kind, group=number, devices=tuple(members))
        return event if not self._filters or any(self._wanted(self._known(bdf)) for bdf in members) else None

    def _known(self, bdf: Bdf) -> EventDevice:
        base = (PCI_DEVICES, str(bdf))
        vendor, device = self._sysfs.number(*base, "vendor"), self._sysfs.number(*base, "device")
        return EventDevice(bdf, vendor or 0, device or 0, self._drivers.get(bdf))

    def _parse(self, text: str) -> Filter:
        return parse_filter(self._sysfs, text, self._names)

    def _wanted(self, device: EventDevice) -> bool:
        """Whether a filter selects it, parsed before the event or now: ``eth0`` may exist only then, or only now."""
        if not self._filters:
            return True
        now = [self._parse(filter_.text) for filter_ in self._filters]
        return any(filter_.matches(device) for filter_ in (*self._filters, *now))


def _ids(text: str) -> tuple[int, int]:
    vendor, _, device = text.partition(":")
    try:
        return int(vendor, 16), int(device, 16)
    except ValueError:
        return 0, 0


def _detail(uevent: Uevent) -> str | None:
    words = [f"{key}={value}" for key, value in sorted(uevent.items()) if not _is_identity(key)]
    return " ".join(words) or None


def _is_identity(key: str) -> bool:
    return key in _IDENTITY or key.startswith(("PCI_", "ID_")) or key == "USEC_INITIALIZED"
