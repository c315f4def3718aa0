"""The host under test is what the other tests take it for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from support.inside import LAB_ONLY

PCI = Path("/sys/bus/pci/devices")


def test_cpu_has_amd_v() -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    assert {"svm", "npt"} <= set(flags.split())
    assert Path("/dev/kvm").exists()


def test_amd_iommu_is_active() -> None:
    assert list(Path("/sys/class/iommu").glob("ivhd*"))
    assert list(Path("/sys/kernel/iommu_groups").iterdir())


def test_vfio_is_there() -> None:
    assert Path("/dev/vfio/vfio").exists()
    assert Path("/sys/bus/pci/drivers/vfio-pci").is_dir()


@pytest.mark.parametrize("role", ["nvme", "nvme2", "edu", "edu2", "nic"])
def test_role_is_a_device_of_its_own(role: str, request: pytest.FixtureRequest) -> None:
    bdf = request.getfixturevalue(role)
    assert [path.name for path in (PCI / bdf / "iommu_group/devices").iterdir()] == [bdf]


@pytest.mark.parametrize("role", ["multifunction", "bridged"])
def test_role_shares_its_group(role: str, request: pytest.FixtureRequest) -> None:
    bdf = request.getfixturevalue(role)
    assert len(list((PCI / bdf / "iommu_group/devices").iterdir())) > 1


@pytest.mark.amdvi(profile="sriov", qemu="system")
def test_virtual_function_has_no_group(virtual_function: str) -> None:
    assert not (PCI / virtual_function / "iommu_group").exists()


def test_runs_as_root_with_room_for_logs(tmp_path: Path) -> None:
    assert os.geteuid() == 0
    (tmp_path / "file").write_text("x")


def test_the_records_of_the_machine_outside_are_not_there(emulated_host: bool) -> None:
    """They refer to other devices, and an ordinary user's emulated host may not even read them."""
    if not emulated_host:
        pytest.skip(f"real hardware has records of its own: {LAB_ONLY}")
    state = Path("/var/lib/kvmpass")
    assert os.path.ismount(state)
    assert os.access(state, os.W_OK)


def test_iommu_trace_grows(iommu_trace: Path | None, nvme: str, emulated_host: bool) -> None:
    if not emulated_host:
        pytest.skip(f"real hardware has no translation trace: {LAB_ONLY}")
    assert iommu_trace is not None
    # Rescanning the namespace is DMA by the drive, wherever its driver is the host's.
    (rescan,) = (PCI / nvme / "nvme").glob("nvme*/rescan_controller")
    before = iommu_trace.stat().st_size
    rescan.write_text("1")
    deadline = time.monotonic() + 20
    while iommu_trace.stat().st_size == before and time.monotonic() < deadline:
        time.sleep(0.2)
    with iommu_trace.open() as lines:
        assert any(nvme.removeprefix("0000:") in line for line in lines)


@pytest.mark.amdvi(profile="no-svm")
def test_host_without_svm_has_no_kvm() -> None:
    assert "svm" not in Path("/proc/cpuinfo").read_text().split()


@pytest.mark.amdvi(profile="no-iommu")
def test_host_without_iommu_has_no_groups() -> None:
    assert not list(Path("/sys/class/iommu").glob("ivhd*"))


@pytest.mark.amdvi(profile="no-intremap")
def test_host_without_interrupt_remapping_has_an_iommu() -> None:
    assert list(Path("/sys/class/iommu").glob("ivhd*"))
