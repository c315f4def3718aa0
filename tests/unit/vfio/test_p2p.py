"""Whether the kernel maps BARs for DMA, and a BAR's dma-buf; the C functions are stood in for."""

from __future__ import annotations

import errno
import os

import pytest
from support.bare import FakeLib, bare

import kvmpass.memory.mapping
import kvmpass.vfio.device
import kvmpass.vfio.group
from kvmpass._native import lib
from kvmpass.errors import HostNotReady
from kvmpass.layout import GIB, PAGE, Range
from kvmpass.memory import HUGE
from kvmpass.vfio import Container, Device, Region, RegionInfo, RegionMapping

BDF = "0000:01:00.0"


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EOPNOTSUPP])
def test_a_device_that_vfio_exports_or_not(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """No feature of that number; or a driver or a kernel configuration without it. The version is the running one."""
    asked = []

    def probe(fd: int, feature: int) -> int:
        asked.append((fd, feature))
        return 0 if len(asked) == 1 else -code

    device: Device = bare(Device, name=BDF)
    monkeypatch.setattr(kvmpass.vfio.device, "lib", FakeLib(vfio_device_feature_probe=probe))
    device.check_p2p()
    with pytest.raises(HostNotReady, match=rf"{BDF} as dma-bufs: Linux 6\.19 .* this is {os.uname().release}") as no:
        device.check_p2p()
    assert "type1" in no.value.__notes__[0]
    assert asked == [(1000, lib.KVMPASS_VFIO_FEATURE_DMA_BUF)] * 2


def test_part_of_a_bar_as_a_dma_buf(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((7, -errno.EINVAL))
    seen = []

    def export(*arguments: int) -> int:
        seen.append(arguments)
        return next(answers)

    device: Device = bare(Device, name=BDF)
    monkeypatch.setattr(kvmpass.vfio.device, "lib", FakeLib(vfio_device_feature_dma_buf=export))
    assert device.export_dma_buf(2, 4 * PAGE, PAGE) == 7
    with pytest.raises(OSError, match=rf"VFIO_DEVICE_FEATURE_DMA_BUF: .*{BDF} BAR 0, 0x0\+0x1000"):
        device.export_dma_buf(0, 0, PAGE)
    assert seen == [(1000, 2, 4 * PAGE, PAGE), (1000, 0, 0, PAGE)]


@pytest.mark.parametrize("result", [-errno.ENOENT, -errno.EINVAL, -errno.ENOTTY])
def test_a_container_that_iommufd_serves(monkeypatch: pytest.MonkeyPatch, result: int) -> None:
    """Only iommufd looks for an object 0, which does not exist; other containers have no such call."""
    container: Container = bare(Container)
    functions = FakeLib(iommufd_ioas_iova_ranges=lambda fd, ioas, ranges: result if ioas == 0 else 0)
    monkeypatch.setattr(kvmpass.vfio.group, "lib", functions)
    if result == -errno.ENOENT:
        with pytest.raises(HostNotReady, match="iommufd serves"):
            container.check_p2p()
    else:
        container.check_p2p()


def test_a_mapping_knows_its_device() -> None:
    """And which part of which BAR it is: that is what iommufd is told."""
    fd = os.memfd_create("device")
    os.truncate(fd, 8 * PAGE)
    device: Device = bare(Device, name=BDF)
    device._fd = fd
    region = Region(device, RegionInfo(2, 4 * PAGE, 2 * PAGE, True, True, (Range(PAGE, 3 * PAGE),)))
    mapping = region.mmap(Range(PAGE, 2 * PAGE))
    assert isinstance(mapping, RegionMapping)
    assert (mapping.device, mapping.index, mapping.area) == (device, 2, Range(PAGE, 2 * PAGE))
    os.pwrite(fd, b"here", 3 * PAGE)
    assert bytes(mapping.view(0, 4)) == b"here"
    mapping.close()
    os.close(fd)


@pytest.mark.parametrize("size, align", [(HUGE - PAGE, PAGE), (HUGE, HUGE), (3 * HUGE, 4 * HUGE), (4 * GIB, GIB)])
def test_large_regions_are_aligned(monkeypatch: pytest.MonkeyPatch, size: int, align: int) -> None:
    """A smaller one has no room for a huge PFN map, and its mapping needs no search for an address."""
    seen = []

    def mmap(size: int, align: int, congruent: int, *rest: int) -> int:
        seen.append((align, congruent))
        return 1 << 40

    functions = FakeLib(kvmpass_mmap=mmap, kvmpass_madvise=lambda *_: 0, kvmpass_munmap=lambda *_: 0)
    monkeypatch.setattr(kvmpass.memory.mapping, "lib", functions)
    region = Region(bare(Device, name=BDF), RegionInfo(0, size, 0, True, True, ()))
    region.mmap(Range(PAGE, PAGE)).close()
    assert seen == [(align, PAGE % align)]
