"""Fixtures: devices by role, and what there is to know about the host under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpass.testing.roles import ROLES, base_role, variable
from kvmpass.testing.state import Mode, State

SYSFS = Path("/sys/bus/pci/devices")


def device(config: pytest.Config, role: str) -> str:
    """The PCI address for ``role``; skips the test if this host has no such device."""
    state = State.of(config)
    if state.mode is Mode.OUTER:
        pytest.fail(f"the fixture {role} is for tests marked amdvi", pytrace=False)
    bdf = state.roles.get(role)
    if bdf is None:
        what = ROLES[base_role(role)][0]
        if state.mode is Mode.HARDWARE:
            pytest.skip(f"no {role} ({what}): {variable(role)} is not set")
        pytest.skip(f"the profile {state.profile!r} has no {role} ({what})")
    return bdf


@pytest.fixture(scope="session")
def nvme(pytestconfig: pytest.Config) -> str:
    """PCI address of an NVMe drive."""
    return device(pytestconfig, "nvme")


@pytest.fixture(scope="session")
def nvme2(pytestconfig: pytest.Config) -> str:
    """PCI address of a second NVMe drive."""
    return device(pytestconfig, "nvme2")


@pytest.fixture(scope="session")
def edu(pytestconfig: pytest.Config) -> str:
    """PCI address of QEMU's ``edu`` device, alone in its group."""
    return device(pytestconfig, "edu")


@pytest.fixture(scope="session")
def edu2(pytestconfig: pytest.Config) -> str:
    """PCI address of a second ``edu`` device, alone in its group."""
    return device(pytestconfig, "edu2")


@pytest.fixture(scope="session")
def nic(pytestconfig: pytest.Config) -> str:
    """PCI address of a network card (e1000e in the lab)."""
    return device(pytestconfig, "nic")


@pytest.fixture(scope="session")
def nic2(pytestconfig: pytest.Config) -> str:
    """PCI address of a second network card."""
    return device(pytestconfig, "nic2")


@pytest.fixture(scope="session")
def legacy_nic(pytestconfig: pytest.Config) -> str:
    """PCI address of a network card that knows INTx only (e1000 in the lab)."""
    return device(pytestconfig, "legacy_nic")


@pytest.fixture(scope="session")
def ahci(pytestconfig: pytest.Config) -> str:
    """PCI address of a SATA controller with a disk."""
    return device(pytestconfig, "ahci")


@pytest.fixture(scope="session")
def virtio_blk(pytestconfig: pytest.Config) -> str:
    """PCI address of a virtio drive."""
    return device(pytestconfig, "virtio_blk")


@pytest.fixture(scope="session")
def xhci(pytestconfig: pytest.Config) -> str:
    """PCI address of a USB controller."""
    return device(pytestconfig, "xhci")


@pytest.fixture(scope="session")
def ivshmem(pytestconfig: pytest.Config) -> str:
    """PCI address of a device whose BAR 2 is nothing but memory."""
    return device(pytestconfig, "ivshmem")


@pytest.fixture(scope="session")
def ivshmem2(pytestconfig: pytest.Config) -> str:
    """PCI address of a second device whose BAR 2 is nothing but memory, larger than the first."""
    return device(pytestconfig, "ivshmem2")


@pytest.fixture(scope="session")
def nvme_pf(pytestconfig: pytest.Config) -> str:
    """PCI address of an NVMe controller with virtual functions."""
    return device(pytestconfig, "nvme_pf")


@pytest.fixture(scope="session")
def igb(pytestconfig: pytest.Config) -> str:
    """PCI address of an igb network card, which has virtual functions."""
    return device(pytestconfig, "igb")


@pytest.fixture(scope="session")
def multifunction(pytestconfig: pytest.Config) -> str:
    """PCI address of a function that shares its IOMMU group with another function."""
    return device(pytestconfig, "multifunction")


@pytest.fixture(scope="session")
def bridged(pytestconfig: pytest.Config) -> str:
    """PCI address of a device that shares its IOMMU group with a bridge."""
    return device(pytestconfig, "bridged")


@pytest.fixture(scope="session")
def bridged2(pytestconfig: pytest.Config) -> str:
    """PCI address of a second device that shares its IOMMU group with a bridge."""
    return device(pytestconfig, "bridged2")


@pytest.fixture(scope="session")
def sriov(pytestconfig: pytest.Config) -> str:
    """PCI address of a physical function with SR-IOV."""
    return device(pytestconfig, "sriov")


@pytest.fixture
def virtual_function(sriov: str, destructive: None) -> Iterator[str]:
    """PCI address of a virtual function, there for one test. With QEMU 7.2 it has no IOMMU group."""
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
    """For fixtures that destroy what is on a device: skips on hardware unless that is allowed."""
    refuse_destruction(pytestconfig)


def refuse_destruction(config: pytest.Config) -> None:
    """Skip unless the devices are emulated ones or ``KVMPASS_TEST_DESTRUCTIVE=1``."""
    if State.of(config).mode is Mode.HARDWARE and os.environ.get("KVMPASS_TEST_DESTRUCTIVE") != "1":
        pytest.skip("destroys data on a real device: KVMPASS_TEST_DESTRUCTIVE=1 is not set")


@pytest.fixture(scope="session")
def emulated_host(pytestconfig: pytest.Config) -> bool:
    """Whether the test runs inside the lab: TCG's times mean nothing there, and devices may be destroyed."""
    return State.of(pytestconfig).mode is not Mode.HARDWARE


@pytest.fixture(scope="session")
def iommu_trace(pytestconfig: pytest.Config) -> Path | None:
    """The emulated IOMMU's translation trace, growing while the test runs; ``None`` on real hardware.

    Lines look like ``devid: 00:04.0 gpa 0x100000 hpa 0x101953000``; see :mod:`kvmpass.lab`.
    """
    return State.of(pytestconfig).iommu_trace
