"""A VFIO device's own character device; the C functions are stood in for."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bare import FakeLib, bare

import kvmpass.vfio.cdev
import kvmpass.vfio.device
from kvmpass._native import ffi, lib
from kvmpass.errors import BadDescriptor, NotAssignable
from kvmpass.vfio import Cdev
from kvmpass.vfio.cdev import node_name

BDF = "0000:01:00.0"


@pytest.fixture
def cdev() -> Cdev:
    one: Cdev = bare(Cdev, name=BDF, open_seconds=0.0)
    return one


def use(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., int]) -> None:
    for module in (kvmpass.vfio.cdev, kvmpass.vfio.device):
        monkeypatch.setattr(module, "lib", FakeLib(**functions))


def make_device(devices: Path, *nodes: str) -> None:
    for node in nodes:
        (devices / BDF / "vfio-dev" / node).mkdir(parents=True)


def test_its_node_is_found_by_its_address(tmp_path: Path) -> None:
    make_device(tmp_path, "vfio3")
    assert node_name(BDF, str(tmp_path)) == "vfio3"
    (tmp_path / "vfio3").touch()
    with Cdev(BDF, str(tmp_path), str(tmp_path)) as device:
        assert device.name == BDF
        assert not hasattr(device, "regions"), "the kernel says nothing of it before it is bound"


def test_a_device_without_a_node(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no VFIO device"):
        node_name(BDF, str(tmp_path))
    (tmp_path / BDF / "vfio-dev").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no VFIO device"):
        node_name(BDF, str(tmp_path))


def test_a_device_without_an_iommu_is_refused_by_its_name(tmp_path: Path) -> None:
    """Linux 7.3 binds and attaches it without any translation (device_cdev.c)."""
    make_device(tmp_path, "noiommu-vfio0")
    (tmp_path / "noiommu-vfio0").touch()
    with pytest.raises(NotAssignable, match=r"noiommu-vfio0 .*would not be translated"):
        Cdev(BDF, str(tmp_path), str(tmp_path))


def test_once_it_is_bound_it_is_a_device(cdev: Cdev, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def bind(fd: int, iommufd: int, token: Any, devid: Any) -> int:
        asked.append((fd, iommufd, token))
        devid[0] = 5
        return 0

    def info(fd: int, out: Any) -> int:
        out.flags, out.num_regions, out.num_irqs = lib.VFIO_DEVICE_FLAGS_PCI | lib.VFIO_DEVICE_FLAGS_RESET, 0, 0
        return 0

    token = uuid.UUID("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3")
    use(monkeypatch, vfio_device_bind_iommufd=bind, vfio_device_get_info=info)
    assert cdev.bind(9) == cdev.bind(9, token) == 5
    assert asked == [(1000, 9, ffi.NULL), (1000, 9, token.bytes)]
    assert (cdev.resettable, cdev.regions, cdev.irqs) == (True, {}, {})


@pytest.mark.parametrize(
    "code, with_token, hint",
    [
        (errno.EPERM, False, "another owner"),
        (errno.EPERM, False, "enable interrupt remapping"),
        (errno.EBUSY, False, "/dev/vfio/GROUP"),
        (errno.EINVAL, False, "has the device open"),
        (errno.EINVAL, True, "use the type 1 back end"),
        (errno.EACCES, False, "one VF token"),
        (errno.EACCES, True, "with which the physical function was opened"),
    ],
)
def test_what_a_refused_bind_says(
    cdev: Cdev, monkeypatch: pytest.MonkeyPatch, code: int, with_token: bool, hint: str
) -> None:
    use(monkeypatch, vfio_device_bind_iommufd=lambda *_: -code)
    with pytest.raises(OSError, match=rf"VFIO_DEVICE_BIND_IOMMUFD: .*{BDF}") as refused:
        cdev.bind(9, uuid.uuid4() if with_token else None)
    assert refused.value.errno == code
    [note] = refused.value.__notes__
    assert hint in note


def test_attached_and_detached(cdev: Cdev, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def note(*arguments: int) -> int:
        calls.append(arguments)
        return 0

    use(monkeypatch, vfio_device_attach_iommufd_pt=note, vfio_device_detach_iommufd_pt=note)
    cdev.attach(7)
    cdev.detach()
    assert calls == [(1000, 7), (1000,)]
    use(monkeypatch, vfio_device_attach_iommufd_pt=lambda *_: -errno.EADDRINUSE)
    with pytest.raises(OSError, match="VFIO_DEVICE_ATTACH_IOMMUFD_PT: ") as refused:
        cdev.attach(7)
    assert "reserved region" in refused.value.__notes__[0]


def test_an_open_one_that_is_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a bound device says anything; and the descriptor is closed in any case."""
    use(monkeypatch, vfio_device_get_info=lambda *_: 0)
    fd = os.open(os.devnull, os.O_RDWR)
    with pytest.raises(BadDescriptor, match=f"open file of {BDF} is bound"):
        Cdev(BDF, fd=fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("passed", [True, False])
def test_a_passed_device_may_not_be_reset_when_it_is_closed(monkeypatch: pytest.MonkeyPatch, passed: bool) -> None:
    """Another process may have a duplicate."""
    use(monkeypatch, vfio_device_get_info=lambda *_: -errno.EINVAL)
    with Cdev(BDF, fd=os.open(os.devnull, os.O_RDWR)) as device:
        device._passed = passed
        for device.resettable in (True, False):
            assert device.resets_at_close == (device.resettable and not passed)
