"""The back end that a machine's domain gets with its first device."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.dma_stage import MEMBERS, NIC, Stage
from support.fake_ioas import FakeIoas
from support.host_tree import Host

import kvmpass.dma.iommufd
from kvmpass.dma import IommufdBackend, Type1
from kvmpass.errors import DeviceInUse, HostNotReady
from kvmpass.host import Bdf
from kvmpass.machine import Machine
from kvmpass.machine.backends import use_backend

BDF = Bdf.parse(NIC)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.add(NIC, "vfio-pci", group=1)
    made.put(f"sys/bus/pci/devices/{NIC}/vfio-dev/vfio0/dev", "511:0")
    made.put("dev/iommu", "")
    made.put("dev/vfio/devices/vfio0", "")
    return made


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    kernel = FakeIoas(MEMBERS)
    monkeypatch.setattr(kvmpass.dma.iommufd, "Iommufd", kernel.iommufd)
    monkeypatch.setattr(kvmpass.dma.iommufd, "Cdev", kernel.cdev)
    return Stage(kernel)


def test_the_domain_gets_what_is_chosen(stage: Stage, host: Host) -> None:
    for wanted, kind in (("type1", Type1), ("iommufd", IommufdBackend), ("type1", Type1), ("auto", IommufdBackend)):
        choice = use_backend(stage.domain, host, [BDF], wanted, vf_token=False)
        assert isinstance(stage.domain.backend, kind)
        assert choice.name == ("type1" if kind is Type1 else "iommufd")
    device = stage.domain.attach(NIC, 1)
    assert stage.registered == {"vm"}, "the VM of the back end before"
    with pytest.raises(DeviceInUse, match="back end"):
        stage.domain.use(Type1)
    stage.domain.detach(device)
    stage.close()


def test_a_back_end_that_the_kernel_lacks(stage: Stage, host: Host) -> None:
    before = stage.domain.backend
    with pytest.raises(HostNotReady, match=r"iommufd is unavailable: .* tokens since Linux 6\.17") as refused:
        use_backend(stage.domain, host, [BDF], "iommufd", vf_token=True)
    assert refused.value.__notes__ == ["use the back end type1, or auto"]
    assert stage.domain.backend is before
    assert use_backend(stage.domain, host, [BDF], "auto", vf_token=True).name == "type1"
    stage.close()


def test_another_vm_is_known_to_the_next_back_end(stage: Stage) -> None:
    stage.domain.rebind_kvm(None)
    stage.domain.use(IommufdBackend)
    stage.domain.attach(NIC, 1)
    assert stage.registered == {None}
    stage.close()


def test_a_name_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no IOMMU back end 'iommu'"):
        Machine(backend="iommu")
