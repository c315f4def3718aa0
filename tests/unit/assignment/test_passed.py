"""Descriptors that ``kvmpass assign`` has inherited: which devices they are, and what is checked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.assignment import passed
from kvmpass.assignment.assign import check_passed
from kvmpass.assignment.passed import PassedDescriptors
from kvmpass.errors import BadDescriptor, GroupNotViable, HostNotReady
from kvmpass.host import Bdf, Look
from kvmpass.host.backend import PASSED, BackendChoice
from kvmpass.host.descriptors import Descriptor, Kind

NIC, SOUND, DISK = (Bdf.parse(text) for text in ("0000:01:00.0", "0000:01:00.1", "0000:02:00.0"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Descriptor 1 is the container, 5 the group of two devices, 6 that of the disk, 7 the disk's own."""
    made = Host(tmp_path)
    for bdf, group in ((NIC, 1), (SOUND, 1), (DISK, 2)):
        made.add(str(bdf), "vfio-pci", group, 0x020000)
    known = {
        1: Descriptor(1, Kind.CONTAINER),
        5: Descriptor(5, Kind.GROUP, group=1),
        6: Descriptor(6, Kind.GROUP, group=2),
        7: Descriptor(7, Kind.DEVICE, bdf=DISK),
    }
    monkeypatch.setattr(passed, "identify", lambda sysfs, fd: known[fd])
    return made


def test_their_devices(host: Host) -> None:
    every = PassedDescriptors(1, (5, 6)).devices(host)
    assert {bdf: fd for bdf, (_, fd) in every.items()} == {NIC: 5, SOUND: 5, DISK: 6}
    chosen = PassedDescriptors(1, (5, 6)).devices(host, [DISK, SOUND])
    assert [(bdf, device.bdf, fd) for bdf, (device, fd) in chosen.items()] == [(DISK, DISK, 6), (SOUND, SOUND, 5)]
    for fds, bdfs, reason in (
        ((6, 7), (), f"two descriptors are of {DISK}"),
        ((5, 6), (NIC,), f"descriptor 6 is of {DISK}, which is not among the devices"),
        ((5,), (NIC, DISK), f"no descriptor is of {DISK}"),
    ):
        with pytest.raises(BadDescriptor, match=reason):
            PassedDescriptors(1, fds).devices(host, bdfs)


def test_what_is_checked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node but /dev/kvm need be open to this user, and that a process has the devices open is no obstacle."""
    choice = BackendChoice("type1", PASSED)
    monkeypatch.setattr(PassedDescriptors, "check", lambda *_: choice)
    host.process(os.getpid() + 1, "parent", nodes=("/dev/vfio/2",))
    host.path("dev/vfio/vfio").unlink()
    host.path("sys/module/vfio_iommu_type1").rmdir()
    passing = PassedDescriptors(1, (6,))
    check_passed(passing.devices(host), Look(host), passing)
    host.add("0000:02:00.1", "e1000e", 2, 0x020000)
    with pytest.raises(GroupNotViable):
        check_passed(passing.devices(host), Look(host), passing)
    host.path("dev/kvm").unlink()
    host.path("sys/module/kvm_amd").rmdir()
    with pytest.raises(HostNotReady):
        check_passed(passing.devices(host), Look(host), passing)


def test_they_are_closed_once(tmp_path: Path) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    descriptors = PassedDescriptors(fds[0], (fds[1],))
    for _ in range(2):
        descriptors.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
