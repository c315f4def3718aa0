"""A machine's back end over descriptors that another process opened; the kernel is made up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.dma_stage import DISK, MEMBERS, NIC, SOUND, Stage
from support.fake_ioas import FakeIoas
from support.fake_vfio import FakeVfio
from support.host_tree import Host

import kvmpass.machine.passed
from kvmpass.dma import IommufdBackend, Type1
from kvmpass.errors import BadDescriptor
from kvmpass.host import Bdf
from kvmpass.host.backend import AUTO
from kvmpass.machine import Machine
from kvmpass.machine.passed import PassedIommu

Pair = Callable[[str, str], tuple[int, int]]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    for number, members in MEMBERS.items():
        for bdf in members:
            made.add(bdf, "vfio-pci", group=number)
    return made


@pytest.fixture
def pair(host: Host) -> Iterator[Pair]:
    """Open two character devices that the host has as those with these paths below /sys/devices."""
    fds = []

    def open_as(first: str, second: str) -> tuple[int, int]:
        for node, path in (("null", first), ("zero", second)):
            fds.append(os.open(f"/dev/{node}", os.O_RDWR))
            link = host.path(f"sys/dev/char/1:{3 if node == 'null' else 5}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(f"../../devices/{path}")
        return fds[-2], fds[-1]

    yield open_as
    for fd in fds:
        os.close(fd)


def cdev(bdf: str) -> str:
    return f"pci0000:00/{bdf}/vfio-dev/vfio0"


def test_the_back_end_is_what_the_descriptor_is(host: Host, pair: Pair) -> None:
    mapper: Any = None
    for path, kind, name in (("iommu", IommufdBackend, "iommufd"), ("vfio", Type1, "type1")):
        iommu, _ = pair(f"virtual/misc/{path}", "virtual/mem/zero")
        for wanted in (AUTO, name):
            with PassedIommu(host, iommu, wanted) as passed:
                assert str(passed.choice) == f"{name}: its descriptor was passed"
                assert isinstance(passed(mapper), kind)
                assert (passed.fd != iommu, os.get_inheritable(passed.fd)) == (True, False)
        other = "type1" if name == "iommufd" else "iommufd"
        with pytest.raises(BadDescriptor, match=f"the back end is {name}, not {other}"):
            PassedIommu(host, iommu, other)
    os.fstat(iommu)  # the caller's stays open


def test_descriptors_that_do_not_go_together(host: Host, pair: Pair) -> None:
    iommu, group = pair("virtual/misc/iommu", "virtual/vfio/1")
    with PassedIommu(host, iommu) as passed:
        with pytest.raises(BadDescriptor, match=r"is a VFIO group .*, and the IOMMU's descriptor is /dev/iommu"):
            passed.device(group, None)
        with pytest.raises(BadDescriptor, match="is /dev/iommu, and the IOMMU's"):
            passed.device(iommu, None)
    with pytest.raises(BadDescriptor, match="not an interface of the IOMMU"):
        PassedIommu(host, group)


def test_the_device_is_what_the_descriptor_is(host: Host, pair: Pair) -> None:
    iommu, device = pair("virtual/misc/iommu", cdev(DISK))
    with PassedIommu(host, iommu) as passed:
        assert str(passed.device(device, None).bdf) == str(passed.device(device, Bdf.parse(DISK)).bdf) == DISK
        with pytest.raises(BadDescriptor, match=f"is of {DISK}, not of {NIC}"):
            passed.device(device, Bdf.parse(NIC))
    container, group = pair("virtual/misc/vfio", "virtual/vfio/1")
    with PassedIommu(host, container) as passed:
        assert str(passed.device(group, Bdf.parse(SOUND)).bdf) == SOUND
        with pytest.raises(BadDescriptor, match=f"of a group with {NIC}, {SOUND}"):
            passed.device(group, None)


@pytest.mark.parametrize("name", ["iommu", "vfio"])
def test_the_back_end_opens_what_is_offered(
    host: Host, pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Duplicates of the descriptors, and no node."""
    kernel: Any = FakeIoas(MEMBERS) if name == "iommu" else FakeVfio(MEMBERS)
    opened: list[tuple[str, int]] = []

    def make(what: str, construct: Callable[..., object]) -> Callable[..., object]:
        def made(*arguments: object, fd: int) -> object:
            opened.append((what, os.fstat(fd).st_rdev))
            os.close(fd)
            return construct(*arguments)

        return made

    kinds = (
        {"Iommufd": "iommufd", "Cdev": "cdev"} if name == "iommu" else {"Container": "container", "Group": "group"}
    )
    for kind, function in kinds.items():
        monkeypatch.setattr(kvmpass.machine.passed, kind, make(kind, getattr(kernel, function)))
    iommu, fd = pair(f"virtual/misc/{name}", cdev(DISK) if name == "iommu" else "virtual/vfio/2")
    before = len([*Path("/proc/self/fd").iterdir()])
    with PassedIommu(host, iommu) as passed:
        stage = Stage(FakeVfio(MEMBERS))
        stage.kernel = kernel
        stage.kvm.kernel = kernel
        stage.domain.use(passed)
        disk: Any = SimpleNamespace(bdf=Bdf.parse(DISK), group=2)
        with passed.offer([disk], {disk.bdf: fd}):
            device = stage.domain.attach(DISK, 2)
        stage.check()
        nodes = [os.makedev(1, 3), os.makedev(1, 5)]
        assert sorted(opened) == sorted(zip(kinds, nodes, strict=True))
        stage.domain.detach(device)
        stage.close()
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_machine_takes_all_or_nothing_by_descriptors(host: Host) -> None:
    with pytest.raises(BadDescriptor, match="descriptor 4095 is not open"):
        Machine(iommu_fd=4095, sysfs=host)
    with pytest.raises(ValueError, match="iommu_fd determines the back end"):
        Machine(iommu_fd=0, backend=Type1, sysfs=host)
    with pytest.raises(ValueError, match="no IOMMU back end"):
        Machine(iommu_fd=0, backend="other", sysfs=host)
