"""What an assignment reads of a device before it opens it, against a made-up host."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.errors import NoSuchDevice, NotAssignable
from kvmpass.host import Bdf
from kvmpass.machine.device import find_bound

NVME = Bdf(0, 1, 0, 0)


def test_a_bound_device_is_the_one_that_sysfs_shows(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.add(str(NVME), "vfio-pci", 7)
    found, shown = find_bound(host, NVME), host.device(NVME)
    assert (found.bdf, found.group, found.reset_methods) == (NVME, 7, ("flr", "bus"))
    assert (found.bdf, found.group, found.reset_methods) == (shown.bdf, shown.group, shown.reset_methods)


@pytest.mark.parametrize("driver", ["nvme", None])
def test_another_driver_is_refused_by_name(tmp_path: Path, driver: str | None) -> None:
    host = Host(tmp_path)
    host.add(str(NVME), driver, 7)
    with pytest.raises(NotAssignable, match=f"{NVME} is bound to {driver or 'no driver'}, not to vfio-pci"):
        find_bound(host, NVME)


def test_a_device_without_a_group_is_not_said_to_have_another_driver(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.add(str(NVME), "vfio-pci", None)
    with pytest.raises(NotAssignable, match=f"{NVME} has no IOMMU group"):
        find_bound(host, NVME)


def test_a_device_that_does_not_exist_is_not_one_without_a_driver(tmp_path: Path) -> None:
    with pytest.raises(NoSuchDevice, match=str(NVME)):
        find_bound(Host(tmp_path), NVME)
