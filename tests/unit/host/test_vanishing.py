"""A device that vanishes at any moment, or whose driver changes, while somebody looks: an answer or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass import host as library
from kvmpass import plan
from kvmpass.errors import NoSuchDevice
from kvmpass.host import Bdf
from kvmpass.host.view.filters import select

NVME, EDU = "0000:01:00.0", "0000:01:00.1"


class Restless(Host):
    """A host where links are missing from the given read on."""

    reads = 0
    at = 0
    links: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gone = ExitStack()

    def place(self, *parts: str) -> str:
        if self.at:
            self.reads += 1
            if self.reads == self.at:
                for link in self.links:
                    here, aside = self.root / link, self.root / "aside" / link
                    aside.parent.mkdir(parents=True, exist_ok=True)
                    here.rename(aside)
                    self.gone.callback(aside.rename, here)
        return super().place(*parts)


LOOKS: dict[str, Callable[[Host], object]] = {
    "list": library.inventory,
    "select": lambda host: select(host, ["01:00"]),
    "show": lambda host: library.describe(host, Bdf.parse(NVME)),
    "doctor": lambda host: library.diagnose(host, Bdf.parse(NVME)),
    "plan": lambda host: plan([NVME], memory="64M", sysfs=host),
    "assign": lambda host: library.check_assignable(host, Bdf.parse(NVME), together=[Bdf.parse(EDU)]),
}


def moments(directory: Path, look: Callable[[Host], object], *links: str) -> Iterator[Exception | None]:
    """Look again and again, the links vanishing one read later each time; what was raised, until it makes no more."""
    host = Restless(directory)
    host.add(NVME, "nvme", 7)
    host.add(EDU, "nvme", 7)
    host.links = links
    while host.reads >= host.at:
        host.reads, host.at = 0, host.at + 1
        with host.gone:
            try:
                look(host)
            except Exception as error:
                yield error
            else:
                yield None


@pytest.mark.parametrize("gone", [NVME, EDU])
@pytest.mark.parametrize("look", LOOKS)
def test_it_vanishes_at_each_read(tmp_path: Path, look: str, gone: str) -> None:
    links = f"sys/bus/pci/devices/{gone}", f"sys/kernel/iommu_groups/7/devices/{gone}"
    seen = [type(error) for error in moments(tmp_path, LOOKS[look], *links)]
    assert len(seen) > 10
    # Nothing but the clear error; a caller that looks at many devices leaves out the one that was removed.
    assert set(seen) <= {type(None), NoSuchDevice}
    assert seen[-1] is type(None)


@pytest.mark.parametrize("look", LOOKS)
def test_its_driver_goes_at_each_read(tmp_path: Path, look: str) -> None:
    seen = list(moments(tmp_path, LOOKS[look], f"sys/bus/pci/devices/{NVME}/driver"))
    assert len(seen) > 10
    assert set(seen) == {None}
