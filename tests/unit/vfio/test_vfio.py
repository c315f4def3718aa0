"""What VFIO's answers become, where no device here gives them: the C functions are stood in for."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.bare import FakeLib, bare

import kvmpass.vfio.device
import kvmpass.vfio.group
from kvmpass._native import lib
from kvmpass.errors import BadDescriptor
from kvmpass.vfio import Container, DependentDevice, Device, Group
from kvmpass.vfio.device import ERR, MSI, REQ, Irqs


@pytest.fixture
def device() -> Device:
    one: Device = bare(Device, name="0000:01:00.0")
    return one


def use(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., int]) -> None:
    for module in (kvmpass.vfio.device, kvmpass.vfio.group):
        monkeypatch.setattr(module, "lib", FakeLib(**functions))


def test_dependent_devices_of_a_hot_reset(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(flags: int) -> Callable[..., int]:
        def fill(fd: int, out: Any) -> int:
            out.flags, out.count = flags, 3
            for one, (id_, segment, bus, devfn) in zip(
                out.devices, ((7, 0, 1, 0), (0, 0x10000 - 1, 0xFF, 0xFF), (0xFFFF_FFFF, 0, 2, 9)), strict=False
            ):
                one.id, one.segment, one.bus, one.devfn = id_, segment, bus, devfn
            return 0

        return fill

    names = ["0000:01:00.0", "ffff:ff:1f.7", "0000:02:01.1"]
    use(monkeypatch, vfio_device_get_pci_hot_reset_info=answer(0))
    assert device.get_pci_hot_reset_info() == [
        DependentDevice(name, group, None) for name, group in zip(names, (7, 0, -1), strict=True)
    ]
    use(monkeypatch, vfio_device_get_pci_hot_reset_info=answer(lib.VFIO_PCI_HOT_RESET_FLAG_DEV_ID | 2))
    assert device.get_pci_hot_reset_info() == [
        DependentDevice(name, None, devid) for name, devid in zip(names, (7, 0, -1), strict=True)
    ]


def test_disabling_irqs_is_idempotent(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    irqs = Irqs(device, MSI, 1, False)
    use(monkeypatch, vfio_device_set_irqs=lambda *_: -errno.EINVAL)
    irqs.disable_irqs()
    for index in (ERR, REQ):
        with pytest.raises(OSError, match="VFIO_DEVICE_SET_IRQS: Invalid argument"):
            replace(irqs, index=index, count=0).disable_irqs()
    use(monkeypatch, vfio_device_set_irqs=lambda *_: -errno.EIO)
    with pytest.raises(OSError, match="VFIO_DEVICE_SET_IRQS: Input/output error"):
        irqs.disable_irqs()


@pytest.mark.parametrize(
    "code, with_token, hint",
    [
        (errno.EACCES, False, "one VF token"),
        (errno.EACCES, True, "with which the physical function was opened"),
        (errno.EINVAL, True, "leave out the VF token"),
        (errno.EINVAL, False, None),
        (errno.ENODEV, True, None),
    ],
)
def test_the_vf_token_is_part_of_the_name(
    monkeypatch: pytest.MonkeyPatch, code: int, with_token: bool, hint: str | None
) -> None:
    token = uuid.UUID("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3")
    names: list[bytes] = []

    def open_device(fd: int, name: bytes) -> int:
        names.append(name)
        return -code

    use(monkeypatch, vfio_group_get_device_fd=open_device)
    group: Group = bare(Group, number=1)
    with pytest.raises(OSError, match="VFIO_GROUP_GET_DEVICE_FD") as refused:
        group.get_device_fd("0000:04:10.0", token if with_token else None)
    assert refused.value.errno == code
    notes = getattr(refused.value, "__notes__", [])
    assert [note for note in notes if hint and hint in note] == notes
    assert bool(notes) is bool(hint)
    assert names == [b"0000:04:10.0 vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3" if with_token else b"0000:04:10.0"]


def test_the_last_page_is_refused_before_the_ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, vfio_iommu_map_dma=lambda *_: pytest.fail("the kernel was asked"))
    container: Container = bare(Container)
    with pytest.raises(OSError, match="VFIO_IOMMU_MAP_DMA: Invalid argument") as refused:
        container.map_dma((1 << 64) - 0x2000, 0, 0x2000, writable=True)
    assert refused.value.errno == errno.EINVAL


def test_a_group_in_a_container_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = lib.VFIO_GROUP_FLAGS_VIABLE | lib.VFIO_GROUP_FLAGS_CONTAINER_SET
    use(monkeypatch, vfio_group_get_status=lambda *_: flags)
    with pytest.raises(BadDescriptor, match="IOMMU group 7 is in a container already"):
        Group(7, fd=os.open(os.devnull, os.O_RDWR))
    use(monkeypatch, vfio_group_get_status=lambda *_: lib.VFIO_GROUP_FLAGS_VIABLE)
    with Group(7, fd=os.open(os.devnull, os.O_RDWR)) as group:
        assert group.number == 7


@pytest.mark.parametrize("has_iommu, has_group", [(False, False), (True, True), (False, True)])
def test_a_container_with_a_group_is_refused(
    monkeypatch: pytest.MonkeyPatch, has_iommu: bool, has_group: bool
) -> None:
    use(
        monkeypatch,
        vfio_iommu_get_info=lambda *_: 0 if has_iommu else -errno.EINVAL,
        vfio_set_iommu=lambda *_: 0 if has_group and not has_iommu else -errno.EINVAL,
    )
    container: Container = bare(Container)
    if has_group:
        with pytest.raises(BadDescriptor, match="has a group already"):
            container.check_unused()
    else:
        container.check_unused()
