"""Addresses and back ends of the lab's devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.errors import LabError, LayoutError
from kvmpass.lab.devices import QemuDevices, qemu_devices

HERE = Path("/run-of-a-lab")


def place(*specs: str, root_ports: bool = False) -> QemuDevices:
    return qemu_devices(specs, HERE, root_ports=root_ports, is_pci=lambda name: name != "nvme-subsys")


def devices(result: QemuDevices) -> list[str]:
    pairs = zip(result.arguments[::2], result.arguments[1::2], strict=True)
    return [value for key, value in pairs if key == "-device"]


def test_plain_devices_take_consecutive_slots_from_04() -> None:
    assert devices(place("edu", "edu", "pci-testdev")) == [
        "edu,dma_mask=0xffffffffffffffff,bus=pcie.0,addr=04.0",
        "edu,dma_mask=0xffffffffffffffff,bus=pcie.0,addr=05.0",
        "pci-testdev,bus=pcie.0,addr=06.0",
    ]


def test_slots_in_use_are_skipped() -> None:
    found = devices(place("edu,addr=04.0", "pci-testdev", "edu,addr=0x5"))
    assert [device.rsplit(",", 1)[1] for device in found] == ["bus=pcie.0", "addr=06.0", "bus=pcie.0"]


def test_the_southbridge_takes_slot_14_unless_a_device_does() -> None:
    def with_southbridge(*specs: str) -> list[str]:
        return devices(qemu_devices(specs, HERE, root_ports=False, is_pci=lambda _: True, southbridge=True))

    bridge, edu = with_southbridge("edu")
    assert bridge.startswith("virtio-blk-pci,class=0x0601,")
    assert (bridge.endswith(",bus=pcie.0,addr=14.0"), edu.endswith("addr=04.0")) == (True, True)
    assert [device.split(",")[0] for device in with_southbridge("edu,addr=14.0")] == ["edu"]
    slots = [device.rsplit("=", 1)[1] for device in with_southbridge(*["pci-testdev"] * 17)]
    assert slots[-2:] == ["13.0", "15.0"]


def test_an_explicit_address_is_kept() -> None:
    found = devices(place("pci-bridge,id=br0,chassis_nr=1,addr=11.0", "pci-testdev,bus=br0,addr=1.0"))
    assert found == ["pci-bridge,id=br0,chassis_nr=1,addr=11.0,bus=pcie.0", "pci-testdev,bus=br0,addr=1.0"]


def test_slots_on_a_bridge_do_not_count() -> None:
    assert devices(place("pci-testdev,bus=br0,addr=4.0", "pci-testdev"))[1].endswith("addr=04.0")


def test_with_root_ports_each_plain_device_gets_one() -> None:
    assert devices(place("pci-testdev", "edu,addr=9.0", root_ports=True)) == [
        "pcie-root-port,id=lab-port04,chassis=4,slot=4,addr=04.0",
        "pci-testdev,bus=lab-port04",
        "edu,addr=9.0,dma_mask=0xffffffffffffffff,bus=pcie.0",
    ]


def test_bridges_stay_on_bus_0() -> None:
    assert devices(place("pci-bridge,chassis_nr=1", root_ports=True)) == [
        "pci-bridge,chassis_nr=1,bus=pcie.0,addr=04.0"
    ]


def test_a_device_without_translation_is_refused() -> None:
    specs = ("pcie-root-port,id=rp", "edu,bus=rp")
    with pytest.raises(LabError, match="does not translate"):
        place(*specs)
    assert len(devices(place(*specs, root_ports=True))) == 2


def test_bus_0_fills_up() -> None:
    place(*["pci-testdev"] * 27)
    with pytest.raises(LabError, match="too many"):
        place(*["pci-testdev"] * 28)


def test_an_nvme_controller_gets_a_drive() -> None:
    result = place("nvme,size=1M", "nvme,serial=OWN,drive=mine")
    assert result.files == [(HERE / "drive0.raw", 1 << 20)]
    assert result.arguments[:2] == ["-drive", f"if=none,id=lab-drive0,format=raw,file={HERE}/drive0.raw"]
    assert devices(result) == [
        "nvme,drive=lab-drive0,serial=LAB00000,bus=pcie.0,addr=04.0",
        "nvme,serial=OWN,drive=mine,bus=pcie.0,addr=05.0",
    ]


def test_a_controller_of_a_subsystem_has_its_drive_as_a_namespace() -> None:
    assert devices(place("nvme-subsys,id=s0", "nvme,subsys=s0"))[1:] == [
        "nvme,subsys=s0,id=lab-nvme1,serial=LAB00001,bus=pcie.0,addr=04.0",
        "nvme-ns,bus=lab-nvme1,drive=lab-drive1",
    ]


def test_a_sata_controller_has_a_disk() -> None:
    result = place("ahci,size=1M", "ahci,id=mine,drive=own")
    assert result.files == [(HERE / "drive0.raw", 1 << 20)]
    assert devices(result) == [
        "ahci,id=lab-ahci0,bus=pcie.0,addr=04.0",
        "ide-hd,bus=lab-ahci0.0,drive=lab-drive0",
        "ahci,id=mine,bus=pcie.0,addr=05.0",
        "ide-hd,drive=own,bus=mine.0",
    ]


@pytest.mark.parametrize("name", ["usb-storage", "virtio-blk-pci"])
def test_other_controllers_get_a_drive(name: str) -> None:
    result = place(f"{name},size=2M")
    assert result.files == [(HERE / "drive0.raw", 2 << 20)]
    assert devices(result)[0].startswith(f"{name},drive=lab-drive0,")


def test_a_drive_can_be_a_file(tmp_path: Path) -> None:
    image = tmp_path / "a,b"
    image.touch()
    result = place(f"nvme,file={str(image).replace(',', ',,')}")
    assert not result.files
    assert result.arguments[1].endswith(f"file={tmp_path}/a,,b")
    with pytest.raises(LabError, match="no such drive"):
        place(f"nvme,file={tmp_path}/nothing")


def test_network_devices_share_a_hub() -> None:
    result = place("e1000e", "e1000e,netdev=mine")
    assert result.arguments[:2] == ["-netdev", "hubport,id=lab-net0,hubid=0"]
    assert result.arguments.count("-netdev") == 1


def test_virtio_devices_use_the_iommu() -> None:
    assert "iommu_platform=on,disable-legacy=on" in devices(place("virtio-rng-pci"))[0]
    assert "iommu_platform=off,bus" in devices(place("virtio-rng-pci,iommu_platform=off"))[0]
    assert "iommu_platform=on,bus" in devices(place("virtio-rng-pci-non-transitional"))[0]


def test_shared_memory_has_a_size() -> None:
    result = place("ivshmem-plain,size=256M")
    assert result.arguments[1] == f"memory-backend-ram,id=lab-memory0,size={256 << 20},share=on,reserve=off"


def test_a_device_that_is_not_on_pci_gets_no_address() -> None:
    assert devices(place("nvme-subsys,id=s0")) == ["nvme-subsys,id=s0"]


@pytest.mark.parametrize("spec", ["", ",x=1", "edu,=1", "edu,a=1,a=2", "two words"])
def test_an_invalid_device_is_refused(spec: str) -> None:
    with pytest.raises(LabError):
        place(spec)


def test_an_invalid_size_is_refused() -> None:
    with pytest.raises(LayoutError, match="'lots' is not a size"):
        place("nvme,size=lots")
