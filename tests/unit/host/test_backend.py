"""Which interface to the IOMMU a machine uses, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.host_tree import Host

import kvmpass.host.kernel.permissions
from kvmpass.errors import HostNotReady
from kvmpass.host import Bdf, diagnose
from kvmpass.host.backend import choose_backend
from kvmpass.host.doctor import Outcome, check_host

NVME, NIC = Bdf.parse("0000:01:00.0"), Bdf.parse("0000:02:00.0")
NODE = "dev/vfio/devices/vfio3"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """With iommufd, VFIO's character devices, and an NVMe drive on vfio-pci."""
    made = Host(tmp_path)
    made.add(str(NVME), "nvme", group=7)
    made.add(str(NIC), "e1000e", group=8)
    made.path(f"sys/bus/pci/devices/{NVME}/driver").unlink()
    made._bind(str(NVME), "vfio-pci")
    made.put(f"sys/bus/pci/devices/{NVME}/vfio-dev/vfio3/dev", "511:3")
    made.put("sys/module/vfio/initstate", "live")
    made.put("proc/devices", "Character devices:\n  1 mem\n241 vfio\n511 vfio-dev\n\nBlock devices:\n259 blkext")
    made.put("proc/sys/kernel/osrelease", "6.12.117")
    made.put("dev/iommu", "")
    made.put(NODE, "")
    return made


def close(monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
    real = kvmpass.host.kernel.permissions.os.access

    def access(path: Path, mode: int, **options: bool) -> bool:
        return not str(path).endswith(nodes) and real(path, mode, **options)

    monkeypatch.setattr(kvmpass.host.kernel.permissions.os, "access", access)


def test_iommufd_where_it_is(host: Host) -> None:
    for bdfs in ([], [NVME], [NVME, NIC]):
        choice = choose_backend(host, bdfs)
        assert (str(choice), choice.obstacle) == ("iommufd: available to this user", "")


@pytest.mark.parametrize(
    "lacks, reason",
    [
        ("dev/iommu", "this kernel has no /dev/iommu"),
        ("511 vfio-dev", "this kernel's VFIO has no character devices"),
        (f"sys/bus/pci/devices/{NVME}/vfio-dev", "this kernel's VFIO has no character devices"),
    ],
)
def test_a_kernel_that_lacks_something(host: Host, lacks: str, reason: str) -> None:
    if lacks.startswith("511"):
        host.put("proc/devices", "241 vfio")
    else:
        host.path(lacks).rename(host.root / "away")
    assert str(choose_backend(host, [NVME])) == f"type1: {reason}"
    wanted = choose_backend(host, [NVME], "iommufd")
    assert (wanted.name, wanted.reason, wanted.obstacle) == ("iommufd", "requested", reason)


@pytest.mark.parametrize("node", ["dev/iommu", NODE])
def test_a_user_who_may_not_open_it(host: Host, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    close(monkeypatch, node)
    assert str(choose_backend(host, [NVME])) == f"type1: this user may not open /{node}"
    wanted = choose_backend(host, [NVME], "iommufd")
    assert (wanted.name, wanted.obstacle) == ("iommufd", "")
    host.path("sys/module/vfio_iommu_type1").rmdir()
    assert str(choose_backend(host, [NVME])) == "iommufd: this kernel has no type 1"


def test_before_vfio_is_loaded_nobody_knows_of_its_character_devices(host: Host) -> None:
    host.path("sys/bus/pci/drivers/vfio-pci").rename(host.root / "away")
    host.put("proc/devices", "  1 mem")
    assert choose_backend(host, [NIC]).name == "iommufd"
    host.path("dev/iommu").unlink()
    assert str(choose_backend(host)) == "type1: this kernel has no /dev/iommu"
    host.put("lib/modules/6.12.117/modules.dep", "kernel/drivers/iommu/iommufd/iommufd.ko:")
    assert choose_backend(host).name == "iommufd"


def test_a_token_needs_a_newer_kernel(host: Host) -> None:
    assert str(choose_backend(host, [NVME], vf_token=True)) == (
        "type1: VFIO's character devices take VF tokens since Linux 6.17"
    )
    host.put("proc/sys/kernel/osrelease", "6.17.1")
    assert choose_backend(host, [NVME], vf_token=True).name == "iommufd"


def test_peer_to_peer_needs_a_newer_kernel(host: Host) -> None:
    lacks = "iommufd maps BARs for peer-to-peer since Linux 6.19; this is Linux 6.12"
    assert str(choose_backend(host, [NVME], p2p=True)) == f"type1: {lacks}"
    assert choose_backend(host, [NVME], "iommufd", p2p=True).obstacle == lacks
    assert choose_backend(host, [NVME], "type1", p2p=True).obstacle == ""
    with pytest.raises(HostNotReady, match=r"this is Linux 6\.12"):
        check_host(host, backend="iommufd", p2p=True)
    host.put("proc/sys/kernel/osrelease", "6.19.0-1-amd64")
    assert choose_backend(host, [NVME], p2p=True).name == "iommufd"


def test_what_is_asked_for(host: Host) -> None:
    assert str(choose_backend(host, [NVME], "type1")) == "type1: requested"
    assert str(choose_backend(host, [NVME], "iommufd")) == "iommufd: requested"
    with pytest.raises(ValueError, match="no IOMMU back end 'type2': auto, iommufd, type1"):
        choose_backend(host, [NVME], "type2")


# --- the doctor


def summaries(host: Host, **options: str) -> dict[str, str]:
    return {finding.check: finding.summary for finding in diagnose(host, NVME, **options)}


def test_the_doctor_asks_for_what_is_used(host: Host) -> None:
    found = summaries(host)
    assert found["iommu-backend"] == "iommufd: available to this user"
    assert found["vfio-type1"] == found["vfio-node"] == "not needed with iommufd"
    assert found["access"] == f"/dev/kvm /dev/iommu /{NODE}"
    found = summaries(host, backend="type1")
    assert (found["iommu-backend"], found["vfio-type1"]) == ("type1: requested", "built in")
    assert found["access"] == "/dev/kvm /dev/vfio/vfio /dev/vfio/7"


def test_a_host_without_type1_is_ready_with_iommufd(host: Host) -> None:
    host.path("sys/module/vfio_iommu_type1").rmdir()
    host.path("dev/vfio/vfio").unlink()
    check_host(host)
    assert {finding.outcome for finding in diagnose(host, NVME)} == {Outcome.PASS}
    with pytest.raises(Exception, match="vfio_iommu_type1 is missing"):
        check_host(host, backend="type1")


def test_iommufd_that_is_asked_for_and_missing(host: Host) -> None:
    host.path("dev/iommu").unlink()
    check_host(host)
    with pytest.raises(Exception, match="iommufd was asked for and is unavailable: this kernel has no /dev/iommu"):
        check_host(host, backend="iommufd", together=[NVME])


def test_how_a_user_gets_the_nodes_of_iommufd(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    close(monkeypatch, "dev/iommu", NODE)
    [finding] = [found for found in diagnose(host, NVME, backend="iommufd") if found.check == "access"]
    assert finding.blocker is not None
    assert f"/dev/iommu, /{NODE}" in finding.blocker.cause
    typed = "\n".join(finding.blocker.commands)
    assert f'SUBSYSTEM=="vfio-dev", KERNELS=="{NVME}", GROUP="vfio", MODE="0660"' in typed
    assert 'SUBSYSTEM=="misc", KERNEL=="iommu", GROUP="vfio", MODE="0660"' in typed
