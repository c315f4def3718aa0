"""Roles from sysfs and from the environment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.repository import ROOT

from kvmpass.testing.fixtures import device
from kvmpass.testing.roles import ROLES, discover, divide, from_environment, group_of, variable
from kvmpass.testing.state import detect


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


def test_workers_share_the_devices_out() -> None:
    """As many of a kind for each; a device with two roles, and a group, belong to one worker."""
    roles = {"nvme": "a", "nvme2": "b", "nvme10": "e", "nvme3": "c", "nvme4": "d", "nic": "f", "multifunction": "g"}
    roles |= {"multifunction2": "h", "peer": "b", "peer2": "a"}
    groups = {"g": "7", "h": "7"}
    first, second = divide(roles, 2, lambda bdf: groups.get(bdf, bdf))
    assert first == {"nvme": "a", "nvme2": "c", "peer": "a"}
    assert second == {"nvme": "b", "nvme2": "d", "peer": "b"}
    assert divide({"nvme2": "x"}, 1, str) == [{"nvme": "x"}]


def test_a_group_is_a_path_of_sysfs(tmp_path: Path) -> None:
    add(tmp_path, "0000:00:04.0", "1b36:0010", "010802", "1")
    add(tmp_path, "0000:00:05.0", "1b36:0010", "010802", "1")
    add(tmp_path, "0000:00:06.0", "1b36:0010", "010802", None)
    groups = [group_of(f"0000:00:0{number}.0", tmp_path) for number in (4, 5, 6)]
    assert groups[0] == groups[1] != groups[2]


def test_too_few_devices_for_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVMPASS_LAB", "KVMPASS_TEST_PLAN"):
        monkeypatch.delenv(name, raising=False)
    for role, bdf in (("nvme", "0000:f1:00.0"), ("nvme2", "0000:f2:00.0"), ("nic", "0000:f3:00.0")):
        monkeypatch.setenv(variable(role), bdf)
    given = SimpleNamespace(stash=pytest.Stash(), workerinput={"workerid": "gw1", "workercount": 2})
    config = cast(pytest.Config, given)
    detect(config).store(config)
    assert device(config, "nvme") == "0000:f2:00.0"
    with pytest.raises(pytest.fail.Exception, match="no nvme2 for this worker: 2 workers share 2 of the kind nvme"):
        device(config, "nvme2")
    with pytest.raises(pytest.fail.Exception, match="KVMPASS_TEST_NIC, KVMPASS_TEST_NIC2"):
        device(config, "nic")
    with pytest.raises(pytest.skip.Exception, match="KVMPASS_TEST_EDU is not set"):
        device(config, "edu")
