"""Fixtures: devices by role, and properties of the host under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpass.testing.roles import ROLES, base_role, devices_of_kind, variable
from kvmpass.testing.state import Mode, State

SYSFS = Path("/sys/bus/pci/devices")


def device(config: pytest.Config, role: str) -> str:
    """Return the PCI address for ``role``. Skips the test if this host has no such device.

    Fails it if there are such devices, but too few for the workers of pytest-xdist.
    """
    state = State.of(config)
    if state.mode is Mode.OUTER:
        pytest.fail(f"the fixture {role} is for tests marked amdvi", pytrace=False)
    bdf = state.roles.get(role)
    if bdf is None:
        if there := devices_of_kind(state.shared, base_role(role)):
            pytest.fail(too_few(state, role, len(there)), pytrace=False)
        what = ROLES[base_role(role)][0]
        if state.mode is Mode.HARDWARE:
            pytest.skip(f"no {role} ({what}): {variable(role)} is not set")
        pytest.skip(f"the profile {state.profile!r} has no {role} ({what})")
    return bdf


def too_few(state: State, role: str, there: int) -> str:
    """Return why a worker of pytest-xdist has no device for ``role``, and the remedy."""
    kind = base_role(role)
    more = f"{variable(kind)}, {variable(f'{kind}2')} …" if state.mode is Mode.HARDWARE else "lab run --device"
    return (
        f"no {role} for this worker: {state.workers} workers share {there} of the kind {kind} "
        "(those of one IOMMU group belong to one worker)\n"
        f"run fewer workers (-n), or name more devices ({more})"
    )


def _role_fixture(role: str, what: str) -> object:
    def address(pytestconfig: pytest.Config) -> str:
        return device(pytestconfig, role)

    address.__doc__ = f"PCI address of {what}."  # pytest --fixtures shows it
    return pytest.fixture(scope="session", name=role)(address)


nvme = _role_fixture("nvme", "an NVMe drive")
nvme2 = _role_fixture("nvme2", "a second NVMe drive")
edu = _role_fixture("edu", "QEMU's ``edu`` device, alone in its group")
edu2 = _role_fixture("edu2", "a second ``edu`` device, alone in its group")
nic = _role_fixture("nic", "a network card (e1000e in the lab)")
nic2 = _role_fixture("nic2", "a second network card")
legacy_nic = _role_fixture("legacy_nic", "a network card that has INTx only (e1000 in the lab)")
ahci = _role_fixture("ahci", "a SATA controller with a disk")
virtio_blk = _role_fixture("virtio_blk", "a virtio drive")
xhci = _role_fixture("xhci", "a USB controller")
ivshmem = _role_fixture("ivshmem", "a device whose BAR 2 is memory")
ivshmem2 = _role_fixture("ivshmem2", "a second device whose BAR 2 is memory, larger than the first")
peer = _role_fixture("peer", "a device whose BAR 2 is memory, alone behind a root port whose bus can be reset")
sibling = _role_fixture("sibling", "a device whose BAR 2 is memory, behind a bridge with others")
sibling2 = _role_fixture("sibling2", "a second device whose BAR 2 is memory, behind that bridge")
nvme_pf = _role_fixture("nvme_pf", "an NVMe controller with virtual functions")
igb = _role_fixture("igb", "an igb network card, which has virtual functions")
multifunction = _role_fixture("multifunction", "a function that shares its IOMMU group with another function")
bridged = _role_fixture("bridged", "a device that shares its IOMMU group with a bridge")
bridged2 = _role_fixture("bridged2", "a second device that shares its IOMMU group with a bridge")
sriov = _role_fixture("sriov", "a physical function with SR-IOV")


@pytest.fixture
def virtual_function(sriov: str, destructive: None) -> Iterator[str]:
    """PCI address of a virtual function, enabled for one test. With QEMU 7.2 it has no IOMMU group."""
    number = SYSFS / sriov / "sriov_numvfs"
    before = number.read_text()
    if before.strip() != "1":
        number.write_text("0")
        number.write_text("1")
    try:
        yield (SYSFS / sriov / "virtfn0").readlink().name
    finally:
        number.write_text("0")
        if before.strip() != "0":
            number.write_text(before)


@pytest.fixture(scope="session")
def destructive(pytestconfig: pytest.Config) -> None:
    """Skip the tests of a fixture that destroys data on a device, on hardware unless that is allowed."""
    refuse_destruction(pytestconfig)


def refuse_destruction(config: pytest.Config) -> None:
    """Skip unless the devices are emulated, or ``KVMPASS_TEST_DESTRUCTIVE=1`` is set."""
    if State.of(config).mode is Mode.HARDWARE and os.environ.get("KVMPASS_TEST_DESTRUCTIVE") != "1":
        pytest.skip("destroys data on a real device: KVMPASS_TEST_DESTRUCTIVE=1 is not set")


@pytest.fixture(scope="session")
def emulated_host(pytestconfig: pytest.Config) -> bool:
    """Whether the test runs inside the lab, where times are meaningless (TCG) and devices may be overwritten."""
    return State.of(pytestconfig).mode is not Mode.HARDWARE


@pytest.fixture(scope="session")
def iommu_trace(pytestconfig: pytest.Config) -> Path | None:
    """Return the emulated IOMMU's translation trace, written while the test runs; ``None`` on real hardware.

    Lines look like ``devid: 00:04.0 gpa 0x100000 hpa 0x101953000``; see :mod:`kvmpass.lab`.
    """
    return State.of(pytestconfig).iommu_trace
