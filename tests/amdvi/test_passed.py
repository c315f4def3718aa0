"""Descriptors that a privileged parent opened: the machine's process has no right but to /dev/kvm, and a limit."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support.drivers import Child, facts, look
from support.inside import drive_of
from support.living import FUNCTIONS
from support.modes import FULL
from support.witness import Edu, locked_bytes, pattern

import kvmpass.cli.assign
import kvmpass.guest.guest
import kvmpass.guest.image
import kvmpass.host.blockers
import kvmpass.host.doctor.catalogue
from kvmpass import host
from kvmpass.cli.main import main
from kvmpass.errors import BadDescriptor
from kvmpass.host.backend import PASSED, cdevs
from kvmpass.layout import MIB
from kvmpass.machine import Machine

NOBODY = 65534
KINDS = pytest.mark.parametrize("kind", ["type1", pytest.param("iommufd", marks=FULL)])
FIELD = {"type1": "VmLck", "iommufd": "VmPin"}


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens: in the end every device of the host is as it was."""
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    before = facts()
    yield
    assert facts() == before


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


def node_of(kind: str, device: host.PciDevice) -> str:
    return f"/{cdevs(host.Sysfs(), device.bdf)[0]}" if kind == "iommufd" else f"/dev/vfio/{device.group}"


@contextmanager
def opened(*nodes: str) -> Iterator[list[int]]:
    fds: list[int] = []
    try:
        for node in nodes:
            fds.append(os.open(node, os.O_RDWR))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def passed(kind: str, *devices: host.PciDevice) -> Iterator[list[int]]:
    """What a parent opens: one descriptor of the IOMMU, and those of the devices."""
    nodes = dict.fromkeys(node_of(kind, device) for device in devices)
    with opened("/dev/iommu" if kind == "iommufd" else "/dev/vfio/vfio", *nodes) as fds:
        yield fds


def machine(iommu: int, **options: Any) -> Machine:
    return Machine(memory="8M", backend="auto", iommu_fd=iommu, **options)


def as_nobody(work: Callable[[], None], memlock: int) -> tuple[int, str, str]:
    """Do it in a fork without capabilities, which may lock ``memlock`` bytes. Its status, and what it says."""
    read, write = zip(*(os.pipe() for _ in range(2)), strict=True)
    child = os.fork()
    if child == 0:
        status: int | str | None = 99
        try:
            os.dup2(write[0], 1)
            os.dup2(write[1], 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            assert "CapEff:\t0000000000000000" in Path("/proc/self/status").read_text()
            for node in ("/dev/iommu", "/dev/vfio/vfio"):
                assert not os.access(node, os.R_OK, effective_ids=True)
            work()
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0)
    for fd in write:
        os.close(fd)
    output, errors = (b"".join(iter(partial(os.read, fd, 1 << 16), b"")).decode() for fd in read)
    for fd in read:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output, errors


def words(fds: Sequence[int], *options: str) -> list[str]:
    return ["assign", "--iommu-fd", str(fds[0]), *(f"--vfio-fd={fd}" for fd in fds[1:]), *options]


def again(fd: int, node: str) -> None:
    """Open a node again, by the same number."""
    os.close(fd)
    assert os.open(node, os.O_RDWR) == fd


@KINDS
def test_nobody_runs_a_guest(
    kind: str, nvme: str, closed_nodes: None, destructive: None, valid: Callable[[str, str], Any]
) -> None:
    """With one descriptor for the IOMMU, and one of the drive or its group."""
    data = os.urandom(MIB)
    drive_of(nvme).write_bytes(data)
    script = FUNCTIONS + "wait_for drive; dd if=$drive bs=64k count=16 2>/dev/null | sha256sum"
    assert kvmpass.cli.assign, "nobody need not be able to read it"
    with TemporaryDirectory() as directory, host.borrow(nvme) as devices, passed(kind, *devices) as fds:
        Path(directory).chmod(0o777)
        file = Path(directory, "status")
        arguments = [*words(fds, "--memory", "192M", "--status-file", str(file)), "--", "sh", "-c", script]
        status, output, errors = as_nobody(lambda: main(arguments), 192 * MIB)
        assert (status, output.split()[:1]) == (0, [hashlib.sha256(data).hexdigest()]), errors
        document = valid("status-file", file.read_text())
        assert (document["bdfs"], document["backend"]) == ([nvme], {"name": kind, "reason": PASSED})
        assert look(nvme).driver == "vfio-pci", "what the parent has bound is the parent's"


@KINDS
def test_nobody_may_not_lock_that_much(kind: str, edu: str, closed_nodes: None) -> None:
    with host.borrow(edu) as devices, passed(kind, *devices) as fds:
        arguments = [*words(fds, "--memory", "64M"), "--", "true"]
        status, output, errors = as_nobody(lambda: main(arguments), 32 * MIB)
        assert (status, output) == (125, "")
        assert "must be locked in memory, this process may lock 32 MiB" in errors


@KINDS
def test_a_machine_leaves_what_it_was_given(kind: str, edu: str) -> None:
    """The caller's descriptors stay open: the device is detached nevertheless, and no memory stays pinned."""
    with host.borrow(edu) as devices, passed(kind, *devices) as fds:
        for _ in range(2):
            with machine(fds[0]) as made:
                device = made.assign(fd=fds[1])
                assert (str(device.bdf), str(made.backend)) == (edu, f"{kind}: its descriptor was passed")
                made.audit()
                data = pattern()
                made.memory.write(0x1000, data)
                bench = Edu(device)
                bench.load(0x1000)
                bench.store(0x2000)
                assert made.memory.read(0x2000, 16) == data
                with pytest.raises(BadDescriptor, match="already"):
                    machine(fds[0])  # one VM for each
                assert locked_bytes(FIELD[kind]) == 8 * MIB
                made.deassign(device)
                assert (made.domain.ledger, locked_bytes(FIELD[kind])) == ([], 0)
                if kind == "iommufd":
                    with pytest.raises(BadDescriptor, match=f"open file of {edu} is bound to an iommufd already"):
                        made.assign(fd=fds[1])
                    again(fds[1], node_of(kind, devices[0]))
                made.assign(edu, fd=fds[1])
            assert locked_bytes(FIELD[kind]) == 0
            if kind == "iommufd":
                again(fds[1], node_of(kind, devices[0]))


@KINDS
def test_a_killed_machine_whose_descriptors_the_parent_has(kind: str, edu: str) -> None:
    """What it had mapped stays pinned until the parent closes them; then the device can be rebound."""

    def work() -> None:
        with machine(fds[0]) as made:
            made.assign(fd=fds[1])
            os.kill(os.getpid(), signal.SIGKILL)

    with host.borrow(edu) as devices:
        with passed(kind, *devices) as fds:
            assert Child(work).wait() == -signal.SIGKILL
            with pytest.raises(BadDescriptor, match="already"):
                machine(fds[0]).close()
        with machine_with(kind, *devices) as made:
            made.audit()


@contextmanager
def machine_with(kind: str, *devices: host.PciDevice) -> Iterator[Machine]:
    with passed(kind, *devices) as fds, machine(fds[0]) as made:
        for fd in fds[1:]:
            made.assign(fd=fd)
        yield made


@pytest.mark.amdvi(kernel="full")
def test_what_is_something_else_is_refused_by_name(edu: str, edu2: str, capfd: pytest.CaptureFixture[str]) -> None:
    with host.borrow(edu, edu2) as devices:
        nodes = [node_of(kind, devices[0]) for kind in ("iommufd", "type1")]
        everything = (
            "/dev/iommu",
            "/dev/vfio/vfio",
            *nodes[:1],
            node_of("type1", devices[1]),
            "/dev/kvm",
            "/dev/null",
        )
        with opened(*everything) as (iommu, container, cdev, group, kvm, null):
            for first, second, reason in (
                (kvm, cdev, f"descriptor {kvm} is kvm, not a node of VFIO or iommufd"),
                (iommu, null, f"descriptor {null} is null, not a node"),
                (cdev, cdev, "not an interface of the IOMMU"),
                (
                    iommu,
                    group,
                    f"descriptor {group} is a VFIO group (/dev/vfio/GROUP), and the IOMMU's descriptor is",
                ),
                (container, cdev, f"descriptor {cdev} is a VFIO character device"),
                (iommu, 999, "descriptor 999 is not open"),
            ):
                with pytest.raises(SystemExit) as ended:
                    main([*words([first, second]), "--", "true"])
                output, errors = capfd.readouterr()
                assert (ended.value.code, output) == (125, "")
                assert reason in errors
