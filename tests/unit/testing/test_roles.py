"""Roles from sysfs and from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.repository import ROOT

from kvmpass.testing.roles import ROLES, discover, from_environment, variable


def add(sysfs: Path, bdf: str, ids: str, class_code: str, group: str | None, vfs: int = 0) -> None:
    device = sysfs / "bus/pci/devices" / bdf
    device.mkdir(parents=True)
    vendor, product = ids.split(":")
    (device / "vendor").write_text(f"0x{vendor}\n")
    (device / "device").write_text(f"0x{product}\n")
    (device / "class").write_text(f"0x{class_code}\n")
    if vfs:
        (device / "sriov_totalvfs").write_text(f"{vfs}\n")
    if group is not None:
        members = sysfs / "kernel/iommu_groups" / group / "devices"
        members.mkdir(parents=True, exist_ok=True)
        (members / bdf).symlink_to(device)
        (device / "iommu_group").symlink_to(members.parent)


def test_discovery(tmp_path: Path) -> None:
    add(tmp_path, "0000:00:05.0", "1b36:0010", "010802", "2")
    add(tmp_path, "0000:00:04.0", "1b36:0010", "010802", "1")
    add(tmp_path, "0000:00:06.0", "1234:11e8", "00ff00", "3")
    add(tmp_path, "0000:00:08.0", "8086:10d3", "020000", "4")
    add(tmp_path, "0000:00:10.0", "1b36:0010", "010802", "5")
    add(tmp_path, "0000:00:10.1", "1b36:0010", "010802", "5")
    add(tmp_path, "0000:00:11.0", "1b36:0001", "060400", "6")
    add(tmp_path, "0000:01:01.0", "1234:11e8", "00ff00", "6")
    add(tmp_path, "0000:00:12.0", "1b36:0010", "010802", "7", vfs=2)
    add(tmp_path, "0000:00:12.1", "1b36:0010", "010802", None)
    assert discover(tmp_path) == {
        "nvme": "0000:00:04.0",
        "nvme2": "0000:00:05.0",
        "edu": "0000:00:06.0",
        "nic": "0000:00:08.0",
        "multifunction": "0000:00:10.0",
        "multifunction2": "0000:00:10.1",
        "bridged": "0000:01:01.0",
        "sriov": "0000:00:12.0",
        "nvme_pf": "0000:00:12.0",
    }


def test_discovery_without_an_iommu(tmp_path: Path) -> None:
    add(tmp_path, "0000:00:04.0", "1b36:0010", "010802", None)
    assert discover(tmp_path) == {"nvme": "0000:00:04.0"}


def test_environment() -> None:
    environment = {"KVMPASS_TEST_NVME2": "01:00.0", "KVMPASS_TEST_DESTRUCTIVE": "1", "KVMPASS_TEST_NIC": ""}
    assert from_environment(environment) == {"nvme2": "0000:01:00.0"}


@pytest.mark.parametrize("name, value", [("KVMPASS_TEST_CAT", "01:00.0"), ("KVMPASS_TEST_NVME", "1:0")])
def test_bad_environment(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        from_environment({name: value})


def test_the_hardware_workflow_names_each_role() -> None:
    """No runner tests a role that the workflow does not pass on. Emulated devices are not hardware."""
    workflow = (ROOT / ".github/workflows/amd-vi.yml").read_text()
    # What `bridged`, `peer` and `sibling` ask for are such devices, too.
    emulated = {"edu", "bridged", "ivshmem", "peer", "sibling", "virtio_blk"}
    for role in ROLES.keys() - emulated:
        assert f"{variable(role)}: ${{{{ vars.{variable(role)} }}}}" in workflow, role
