"""Descriptors that a privileged parent opened: the machine's process has no right but to /dev/kvm, and a limit."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.drivers import facts
from support.inside import drive_of
from support.living import running
from support.modes import FULL

from kvmpass import host
from kvmpass.host.backend import cdevs
from kvmpass.layout import MIB

NOBODY = 65534
BOTH = pytest.mark.parametrize("kind", ["type1", pytest.param("iommufd", marks=FULL)])


@pytest.fixture
def closed_nodes() -> Iterator[None]:
    """Everybody may open /dev/kvm, and only root the nodes of VFIO and iommufd."""
    modes = {Path("/dev/kvm"): 0o666, Path("/dev/vfio"): 0o700, Path("/dev/iommu"): 0o600}
    before = {path: path.stat().st_mode for path in modes if path.exists()}
    for path in before:
        path.chmod(modes[path])
    yield
    for path, mode in before.items():
        path.chmod(mode)


@contextmanager
def opened(kind: str, *devices: host.PciDevice) -> Iterator[tuple[int, list[int]]]:
    """What a parent opens and passes: one descriptor of the IOMMU, and those of the devices."""
    if kind == "iommufd":
        nodes = [Path("/", cdevs(host.Sysfs(), device.bdf)[0]) for device in devices]
    else:
        nodes = [Path(f"/dev/vfio/{group}") for group in {device.group: None for device in devices}]
    made = [os.open(node, os.O_RDWR) for node in ("/dev/iommu" if kind == "iommufd" else "/dev/vfio/vfio", *nodes)]
    try:
        yield made[0], made[1:]
    finally:
        for fd in made:
            os.close(fd)


def as_nobody(work: Callable[[], None], memlock: int) -> None:
    """Do it in a fork without capabilities, which may lock ``memlock`` bytes."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            assert "CapEff:\t0000000000000000" in Path("/proc/self/status").read_text()
            for node in ("/dev/iommu", "/dev/vfio/vfio", "/dev/mem"):
                assert not os.access(node, os.R_OK, effective_ids=True)
            work()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@BOTH
def test_nobody_runs_a_guest(kind: str, nvme: str, closed_nodes: None, destructive: None) -> None:
    data = os.urandom(MIB)
    drive_of(nvme).write_bytes(data)
    before = facts()
    script = "wait_for drive; dd if=$drive bs=64k count=16 2>/dev/null | sha256sum"

    def work() -> None:
        with running(script, backend="auto", iommu_fd=iommu, fds=fds) as guest:
            assert guest.machine.backend.name == kind
            assert [str(device.bdf) for device in guest.machine.devices] == [nvme]
            guest.machine.audit()
            assert guest.end(200).status == 0
            assert hashlib.sha256(data).hexdigest() in guest.said

    with host.borrow(nvme) as devices, opened(kind, *devices) as (iommu, fds):
        as_nobody(work, 192 * MIB)
    assert facts() == before
