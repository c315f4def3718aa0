"""One look at a host: what several questions about its devices need is read once."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import cached_property

from kvmpass.errors import NoSuchDevice
from kvmpass.host.address import Bdf
from kvmpass.host.names import Names
from kvmpass.host.processes import OpenNodes
from kvmpass.host.sysfs import IommuGroup, PciDevice, Sysfs

# What is looked for in the paths of devices: PCI addresses, NVMe subsystems.
_COMPONENT = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]|nvme-subsys\d+")


class Look:
    """A host at one moment, for questions about one device or all of them. Reads what it is asked for, once.

    What is to be judged after a change needs another look. Synchronization: for one thread.
    """

    def __init__(self, sysfs: Sysfs, names: Names | None = None) -> None:
        self.sysfs = sysfs
        self.names = names or Names(sysfs)
        self._devices: dict[Bdf, PciDevice | None] = {}
        self._groups: dict[int, IommuGroup] = {}
        self._listings: dict[str, dict[str, list[str]]] = {}
        self._texts: dict[str, str | None] = {}

    def device(self, bdf: Bdf) -> PciDevice | None:
        """One function; None where it is gone."""
        if bdf not in self._devices:
            self._devices[bdf] = None
            with contextlib.suppress(NoSuchDevice):
                self._devices[bdf] = self.sysfs.device(bdf)
        return self._devices[bdf]

    def group(self, number: int) -> IommuGroup:
        """One IOMMU group. Raises ``NotAssignable`` where the kernel has no such group."""
        if number not in self._groups:
            self._groups[number] = self.sysfs.group(number)
        return self._groups[number]

    def text(self, path: str) -> str | None:
        """A file's text, for what is large and not one device's; None where it is missing or cannot be read."""
        if path not in self._texts:
            self._texts[path] = self.sysfs.text(path)
        return self._texts[path]

    def below(self, listing: str, component: Bdf | str) -> list[str]:
        """The sorted names in a class directory such as ``sys/class/block`` that belong to a device.

        ``component`` is a PCI function or an NVMe subsystem; what is below it at any depth belongs to it.
        """
        if listing not in self._listings:
            index: dict[str, list[str]] = {}
            self._listings[listing] = index
            for name, path in self._links(listing):
                for found in {part for part in path.split("/") if _COMPONENT.fullmatch(part)}:
                    index.setdefault(found, []).append(name)
        return self._listings[listing].get(str(component), [])

    def _links(self, listing: str) -> Iterator[tuple[str, str]]:
        directory = self.sysfs.path(listing)
        for name in self.sysfs.names(listing):
            with contextlib.suppress(OSError):
                # Links hold the whole device path: no need to resolve hundreds of them.
                yield name, os.readlink(f"{directory}/{name}")  # noqa: PTH115

    @cached_property
    def holders(self) -> OpenNodes:
        """Who has which device nodes open."""
        return OpenNodes(self.sysfs)
