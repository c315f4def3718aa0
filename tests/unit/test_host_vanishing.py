"""A device that vanishes at any moment, or whose driver changes, while somebody looks: an answer or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host_tree import Host

from kvmpass import host as library
from kvmpass import plan
from kvmpass.errors import NoSuchDevice
from kvmpass.host import Bdf

NVME, EDU = "0000:01:00.0", "0000:01:00.1"


class Restless(Host):
    """A host where ``event`` happens at the given read."""

    reads = 0
    at = 0
    event: Callable[[], object] = staticmethod(lambda: None)

    def path(self, *parts: str) -> Path:
        if self.at:
            self.reads += 1
            if self.reads == self.at:
                self.event()
        return super().path(*parts)


LOOKS: dict[str, Callable[[Host], object]] = {
    "list": library.inventory,
    "select": lambda host: library.select(host, ["01:00"]),
    "show": lambda host: library.describe(host, Bdf.parse(NVME)),
    "doctor": lambda host: library.diagnose(host, Bdf.parse(NVME)),
    "plan": lambda host: plan([NVME], memory="64M", sysfs=host),
    "assign": lambda host: library.check_assignable(host, Bdf.parse(NVME), together=[Bdf.parse(EDU)]),
}


def moments(tmp_path: Path, look: Callable[[Host], object]) -> Iterator[Restless]:
    """A host for each read that ``look`` makes, until it makes no more."""
    number = 0
    while True:
        number += 1
        host = Restless(tmp_path / str(number))
        host.add(NVME, "nvme", 7)
        host.add(EDU, "nvme", 7)
        host.at = number
        yield host
        if host.reads < number:
            return


@pytest.mark.parametrize("gone", [NVME, EDU])
@pytest.mark.parametrize("look", LOOKS)
def test_it_vanishes_at_each_read(tmp_path: Path, look: str, gone: str) -> None:
    seen = set()
    for host in moments(tmp_path, LOOKS[look]):

        def vanish(host: Restless = host) -> None:
            host.at = 0
            host.remove(gone)
            host.path("sys/kernel/iommu_groups/7/devices", gone).unlink()
            host.at = host.reads

        host.event = vanish
        try:
            LOOKS[look](host)
        except Exception as error:
            seen.add(type(error))
    # Nothing but the clear error; whoever looks at many devices leaves out the one that went.
    assert seen <= {NoSuchDevice}, seen


@pytest.mark.parametrize("look", LOOKS)
def test_its_driver_changes_at_each_read(tmp_path: Path, look: str) -> None:
    for host in moments(tmp_path, LOOKS[look]):
        link = host.path("sys/bus/pci/devices", NVME, "driver")

        def change(link: Path = link) -> None:
            if link.is_symlink():
                link.unlink()

        host.event = change
        LOOKS[look](host)
