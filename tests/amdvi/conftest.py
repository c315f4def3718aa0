"""Everything below needs AMD-V, AMD-Vi and VFIO: real hardware, or the lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.testing import Profile

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("amdvi") is None:
            item.add_marker(pytest.mark.amdvi)


def pytest_kvmpass_profiles() -> dict[str, Profile]:
    """Hosts of single tests.

    One drive and nothing else; two devices on one bus; a device on bus 0, where the emulated IOMMU's events name it;
    a page of 1 GiB; a physical function that vfio-pci may make virtual ones of.
    """
    return {
        "single": Profile(devices=("nvme,addr=04.0",)),
        "bus": Profile(
            devices=(
                "pci-bridge,id=bridge0,chassis_nr=1,addr=11.0",
                "edu,bus=bridge0,addr=01.0",
                "edu,bus=bridge0,addr=02.0",
            )
        ),
        "faults": Profile(devices=("edu,addr=06.0",)),
        "gigantic": Profile(devices=("edu,addr=06.0",), memory="4G", append="hugepagesz=1G hugepages=1"),
        "vf-token": Profile(
            devices=(
                "nvme-subsys,id=subsys0",
                "nvme,subsys=subsys0,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
            ),
            append="vfio_pci.enable_sriov=1",
        ),
    }
