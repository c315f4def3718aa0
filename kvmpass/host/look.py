"""A cached view of a host: what several questions about its devices need is read once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar, cast

from kvmpass._lazy import lazy_pattern
from kvmpass.errors import NoSuchDevice
from kvmpass.host.address import PATTERN, Bdf
from kvmpass.host.kernel.kmsg import KernelLog
from kvmpass.host.kernel.mounts import Mount, mounts
from kvmpass.host.kernel.processes import OpenNodes, namespaces, process
from kvmpass.host.sysfs import PCI_DEVICES, IommuGroup, PciDevice, Sysfs

if TYPE_CHECKING:
    from kvmpass.host.names import Names

# Components in the paths of devices that identify them: PCI addresses, NVMe subsystems.
_COMPONENT = lazy_pattern(rf"(?:^|/)({PATTERN}|nvme-subsys\d+)(?=/|$)")

T = TypeVar("T")

# Interfaces of every new network namespace: loopback, and fallback devices of tunnels.
_IN_EVERY_NAMESPACE = frozenset(
    {"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip6gre0", "ip_vti0", "ip6_vti0"}
)
_NAMED_NAMESPACES = ("run/netns", "run/docker/netns")  # ip-netns(8)

# drivers/pci/setup-res.c: pci_assign_resource; the messages before Linux 6.10, and since.
_BAR = lazy_pattern(
    rf"(?:pci|[\w-]+) (?P<bdf>{PATTERN}): BAR (?P<index>\d+)"
    r"(?: \[(?P<new>[^\]]*)\])?: (?:(?P<refused>can't assign; no space|failed to assign|no space for)|assigned)"
    r"(?: \[(?P<old>[^\]]*)\])?"
)


class Look:
    """A host at one moment, for questions about one device or all of them. Reads once what it returns.

    What is read through ``sysfs`` is read again each time. After a change, use a new one: :meth:`again`.

    Synchronization: for one thread.
    """

    def __init__(self, sysfs: Sysfs, names: Names | None = None) -> None:
        self.sysfs = sysfs
        self._names = names
        self._devices: dict[Bdf, PciDevice | None] = {}
        self._found: dict[Hashable, object] = {}

    @property
    def names(self) -> Names:
        """The names of its devices."""
        if self._names is None:
            from kvmpass.host.names import Names

            self._names = Names(self.sysfs)
        return self._names

    def again(self) -> Look:
        """Return a view of the host at this moment, which shares what no change of a driver changes.

        These are the names of devices, and the BARs without an address, for which all of the kernel's log is read.
        """
        look = Look(self.sysfs, self._names)
        if "unplaced_bars" in vars(self):
            look.unplaced_bars = self.unplaced_bars
        return look

    def know(self, devices: Iterable[PciDevice]) -> None:
        """Store devices that were just read."""
        self._devices.update((device.bdf, device) for device in devices)

    def device(self, bdf: Bdf) -> PciDevice | None:
        """Return one function; None if it does not exist."""
        if bdf not in self._devices:
            self._devices[bdf] = None
            with contextlib.suppress(NoSuchDevice):
                self._devices[bdf] = self.sysfs.device(bdf)
        return self._devices[bdf]

    def require(self, bdf: Bdf) -> PciDevice:
        """Return one function. Raises ``NoSuchDevice``."""
        return self.device(bdf) or self.sysfs.device(bdf)  # which raises, unless it was plugged in meanwhile

    def group(self, number: int) -> IommuGroup:
        """Return one IOMMU group. Raises ``NotAssignable`` if the kernel has no such group."""
        return self.remembered(("group", number), lambda look: look.sysfs.group(number))

    def attributes(self, bdf: Bdf) -> frozenset[str]:
        """Return the names in a function's directory: with them, what most functions lack need not be tried."""
        return self.remembered(("attributes", bdf), lambda look: frozenset(look.sysfs.names(PCI_DEVICES, str(bdf))))

    def virtual_functions(self, bdf: Bdf) -> list[Bdf]:
        """Return the enabled virtual functions of a physical one, by address."""
        if any(name.startswith("virtfn") for name in self.attributes(bdf)):
            return self.sysfs.virtual_functions(bdf)
        return []

    def text(self, path: str) -> str | None:
        """Return the text of a file that is not of one device; None if it cannot be read."""
        return self.remembered(("text", path), lambda look: look.sysfs.text(path))

    def fields(self, path: str) -> dict[str, str]:
        """Return the fields in the first paragraph of such a file: names, colons and values."""
        lines = (self.text(path) or "").partition("\n\n")[0].splitlines()
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def below(self, listing: str, component: Bdf | str) -> list[str]:
        """Return the sorted names in a class directory such as ``sys/class/block`` that belong to a device.

        ``component`` is a PCI function or an NVMe subsystem; entries below it at any depth belong to it.
        """
        return self.remembered(("listing", listing), lambda look: look._by_component(listing)).get(str(component), [])

    def _by_component(self, listing: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        directory = self.sysfs.path(listing)
        for name in self.sysfs.names(listing):
            with contextlib.suppress(OSError):
                # Links have the whole device path: no need to resolve hundreds of them.
                path = os.readlink(f"{directory}/{name}")  # noqa: PTH115
                for component in set(_COMPONENT.findall(path)):
                    found.setdefault(component, []).append(name)
        return found

    @cached_property
    def groups(self) -> list[IommuGroup]:
        """All IOMMU groups, by number."""
        return self.sysfs.groups(self.group)

    @cached_property
    def log(self) -> KernelLog:
        """The kernel's log, as far as it reaches back."""
        return self.sysfs.log()

    @cached_property
    def unplaced_bars(self) -> dict[Bdf, dict[int, str]]:
        """The BARs without an assigned address, by index, with the kernel's description (``mem size 0x…``)."""
        found: dict[Bdf, dict[int, str]] = {}
        log = self.log if "log" in vars(self) else self.sysfs.log(b": BAR ")
        for record in log.records:
            # Of a host's messages about BARs nearly all are none of these.
            if not record.by_kernel or not ("assign" in record.text or "no space for" in record.text):
                continue
            match = _BAR.match(record.text)
            if match is None:
                continue
            bars, index = found.setdefault(Bdf.parse(match["bdf"]), {}), int(match["index"])
            bars.pop(index, None)  # the last message counts
            if match["refused"]:
                bars[index] = match["new"] or match["old"] or ""
        return found

    def remembered(self, key: Hashable, find: Callable[[Look], T]) -> T:
        """Return the result of ``find``, which is called once for each ``key``."""
        if key not in self._found:
            self._found[key] = find(self)
        return cast(T, self._found[key])

    # --- of several devices

    @cached_property
    def mounts(self) -> list[Mount]:
        """The mounts of all namespaces, this process's first."""
        return mounts(self.sysfs)

    @cached_property
    def nvme_subsystems(self) -> dict[str, list[str]]:
        """The subsystems of each NVMe controller."""
        found: dict[str, list[str]] = {}
        for subsystem in self.sysfs.names("sys/class/nvme-subsystem"):
            for name in self.sysfs.names("sys/class/nvme-subsystem", subsystem):
                found.setdefault(name, []).append(subsystem)
        return found

    @cached_property
    def btrfs_members(self) -> frozenset[str]:
        """The disks and partitions of every mounted btrfs, of which mountinfo has only one."""
        base = "sys/fs/btrfs"
        volumes = self.sysfs.names(base)
        return frozenset(name for volume in volumes for name in self.sysfs.names(base, volume, "devices"))

    def node_name(self, number: str) -> str:
        """Return the name below ``/dev`` of a character device ``major:minor``; empty without one."""
        return self.sysfs.fields("sys/dev/char", number, "uevent", separator="=").get("DEVNAME", "")

    @cached_property
    def foreign_interfaces(self) -> list[str]:
        """Network interfaces of other namespaces, with a process; of a namespace without process, its name."""
        found, seen = [], {self.sysfs.link("proc/self/ns/net")}
        for pid, namespace in namespaces(self.sysfs, "net").items():
            seen.add(namespace)
            names = [line.partition(":")[0].strip() for line in self.sysfs.lines("proc", str(pid), "net/dev")[2:]]
            who = process(self.sysfs, pid)
            found += [f"{name} of {who}" for name in names if name not in _IN_EVERY_NAMESPACE]
        for directory in _NAMED_NAMESPACES:
            for name in self.sysfs.names(directory):
                node = self.sysfs.place(directory, name)
                number = self.sysfs.ask(f"inode {directory}/{name}", partial(_inode, node))
                if number is not None and f"net:[{number}]" not in seen:
                    found.append(f"those of {name}")
        return found

    @cached_property
    def holders(self) -> OpenNodes:
        """Which processes have which device nodes open."""
        return OpenNodes(self.sysfs)


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino  # noqa: PTH116 - as everything here
    except OSError:
        return None
