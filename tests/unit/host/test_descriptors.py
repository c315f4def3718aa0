"""What a passed descriptor is: its device number says so, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.errors import BadDescriptor, NoSuchDevice, NotAssignable
from kvmpass.host import Bdf
from kvmpass.host.descriptors import Descriptor, Kind, identify, passed_devices

NIC, DISK = "0000:01:00.0", "0000:02:00.0"
Opened = Callable[[str], int]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.add(NIC, "vfio-pci", group=7, above="0000:00:1c.0")
    made.add(DISK, "nvme", group=7)
    return made


@pytest.fixture
def opened(host: Host) -> Iterator[Opened]:
    """Open a character device that the host has as the one with that path below /sys/devices."""
    fds = []

    def open_as(path: str) -> int:
        fds.append(os.open("/dev/null", os.O_RDWR))
        link = host.path("sys/dev/char/1:3")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../devices/{path}")
        return fds[-1]

    yield open_as
    for fd in fds:
        os.close(fd)


def test_each_kind(host: Host, opened: Opened) -> None:
    for path, kind, bdf, group in (
        ("virtual/misc/iommu", Kind.IOMMUFD, None, None),
        ("virtual/misc/vfio", Kind.CONTAINER, None, None),
        ("virtual/vfio/7", Kind.GROUP, None, 7),
        (f"pci0000:00/0000:00:1c.0/{NIC}/vfio-dev/vfio3", Kind.DEVICE, Bdf.parse(NIC), None),
    ):
        fd = opened(path)
        assert identify(host, fd) == Descriptor(fd, kind, bdf, group)


def test_what_has_no_iommu_is_refused_by_name(host: Host, opened: Opened) -> None:
    for path in ("virtual/vfio/noiommu-7", f"pci0000:00/{NIC}/vfio-dev/noiommu-vfio3"):
        name = path.rpartition("/")[2]
        with pytest.raises(NotAssignable, match=f"is {name} of VFIO, which has no IOMMU"):
            identify(host, opened(path))


def test_what_is_something_else(host: Host, opened: Opened, tmp_path: Path) -> None:
    for path in ("virtual/misc/kvm", "virtual/mem/null", "virtual/tty/vfio"):
        with pytest.raises(BadDescriptor, match=path.rpartition("/")[2]):
            identify(host, opened(path))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BadDescriptor, match="is no character device"):
            identify(host, fd)
    finally:
        os.close(fd)
    for number in (fd, -1, 1 << 40):
        with pytest.raises(BadDescriptor, match=rf"descriptor {number} is not open"):
            identify(host, number)
    fd = opened("virtual/vfio/7")
    host.path("sys/dev/char/1:3").unlink()
    with pytest.raises(BadDescriptor, match="does not have now"):
        identify(host, fd)


def test_the_devices_of_a_group_are_those_with_a_vfio_driver(host: Host) -> None:
    found = passed_devices(host, Descriptor(5, Kind.GROUP, group=7))
    assert [str(device.bdf) for device in found] == [NIC]
    host.put(f"sys/bus/pci/devices/{DISK}/vfio-dev/vfio4/dev", "511:4")
    found = passed_devices(host, Descriptor(5, Kind.GROUP, group=7))
    assert [str(device.bdf) for device in found] == [NIC, DISK]


def test_descriptors_without_a_device(host: Host) -> None:
    with pytest.raises(BadDescriptor, match="descriptor 5 is /dev/iommu, not a device's or a group's"):
        passed_devices(host, Descriptor(5, Kind.IOMMUFD))
    with pytest.raises(NoSuchDevice):
        passed_devices(host, Descriptor(5, Kind.DEVICE, bdf=Bdf.parse("0000:09:00.0")))
    host.add("0000:03:00.0", "e1000e", group=8)
    with pytest.raises(NotAssignable, match="IOMMU group 8, without a device on vfio-pci"):
        passed_devices(host, Descriptor(5, Kind.GROUP, group=8))


def test_a_device_whose_dma_is_not_translated(host: Host) -> None:
    host.put("sys/kernel/iommu_groups/7/name", "vfio-noiommu")
    host.add("0000:04:00.0", "vfio-pci")
    for bdf in (NIC, "0000:04:00.0"):
        with pytest.raises(NotAssignable, match=f"descriptor 5 is of {bdf}, which has no IOMMU"):
            passed_devices(host, Descriptor(5, Kind.DEVICE, bdf=Bdf.parse(bdf)))
