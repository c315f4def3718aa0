"""What VFIO says of a device: resets that it shares, its special interrupts, the secret of virtual functions."""

from __future__ import annotations

import errno
import os
import select
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
from support.inside import LAB_ONLY
from support.living import wait_until
from support.type1 import groups_of
from support.witness import traces

from kvmpass import host
from kvmpass.dma import BackendFactory, IommufdBackend, Type1
from kvmpass.machine import AssignedDevice, Machine
from kvmpass.vfio import Group
from kvmpass.vfio.device import ERR, INTX, MSI, MSIX, REQ

# 6.12 has the error interrupt for PCI Express only, 7.3 for every function.
ERRORS_OF_ALL = host.Sysfs().kernel() >= (7, 0)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine(memory="2M") as machine:
        yield machine


@pytest.fixture
def assigned(edu: str, machine: Machine) -> Iterator[AssignedDevice]:
    with host.borrow(edu):
        device = machine.assign(edu)
        yield device
        machine.deassign(device)


def signalled(eventfd: int) -> bool:
    ready, _, _ = select.select([eventfd], [], [], 0)
    return bool(ready) and bool(os.eventfd_read(eventfd))


def test_interrupts_that_the_device_has(assigned: AssignedDevice) -> None:
    irqs = assigned.vfio.irqs
    assert {INTX, MSI, MSIX, REQ} <= set(irqs)
    assert irqs[REQ].count == 1
    assert (ERR in irqs) == ERRORS_OF_ALL, "edu is not PCI Express"


def test_the_request_interrupt_and_its_loopback(assigned: AssignedDevice) -> None:
    request = assigned.vfio.irqs[REQ]
    request.disable_irqs()  # the machine's own
    with pytest.raises(OSError, match=r"VFIO_DEVICE_SET_IRQS.*trigger vector 0"):
        request.trigger()
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        request.set_irqs(0, [eventfd])
        assert not signalled(eventfd)
        request.trigger()
        assert signalled(eventfd)
        request.disable_irqs()
        request.disable_irqs()
        with pytest.raises(OSError) as refused:
            request.trigger()
        assert refused.value.errno == errno.EINVAL
        assert not signalled(eventfd)
        if not ERRORS_OF_ALL:
            with pytest.raises(OSError) as refused:
                replace(request, index=ERR).set_irqs(0, [eventfd])
            assert refused.value.errno == errno.EINVAL
    finally:
        os.close(eventfd)


def test_the_host_requests_the_devices_release(machine: Machine, assigned: AssignedDevice, edu: str) -> None:
    """Unbinding the driver signals REQ; the device is then released, by us first, and the unbinding ends."""
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    sysfs = host.Sysfs()
    try:
        assigned.vfio.irqs[REQ].set_irqs(0, [eventfd])
        with pytest.raises(TimeoutError):
            sysfs.write(sysfs.path("sys/bus/pci/drivers/vfio-pci/unbind"), edu, timeout=2)
        wait_until(lambda: signalled(eventfd))
        machine.deassign(assigned)
        deadline = time.monotonic() + 20
        while sysfs.driver(host.Bdf.parse(edu)) is not None:
            assert time.monotonic() < deadline, "vfio-pci still has the device"
            time.sleep(0.01)
        assert traces("vfio") == []
        assert machine.domain.ledger == []
        machine.audit()
    finally:
        os.close(eventfd)


def test_a_root_bus_has_no_hot_reset(machine: Machine, assigned: AssignedDevice, emulated_host: bool) -> None:
    if not emulated_host:
        pytest.skip(f"where the device sits is not known: {LAB_ONLY}")
    group = groups_of(machine)[assigned.group]
    for call in (assigned.vfio.get_pci_hot_reset_info, lambda: assigned.vfio.pci_hot_reset([group])):
        with pytest.raises(OSError, match="HOT_RESET") as refused:
            call()
        assert refused.value.errno == errno.ENODEV


def test_hot_reset_behind_a_bridge(bridged: str, machine: Machine) -> None:
    with host.borrow(bridged):
        device = machine.assign(bridged)
        (dependent,) = device.vfio.get_pci_hot_reset_info()
        assert (dependent.name, dependent.group, dependent.devid) == (bridged, device.group, None)
        for groups in ([], [Stranger()]):
            with pytest.raises(OSError, match="VFIO_DEVICE_PCI_HOT_RESET: Invalid argument") as refused:
                device.vfio.pci_hot_reset(groups)  # type: ignore[arg-type]
            assert "get_pci_hot_reset_info" in refused.value.__notes__[0]
        device.enable()
        device.regions[0].write_int(4, 0)
        assert device.regions[0].read_int(4) == 0xFFFFFFFF
        device.vfio.pci_hot_reset([groups_of(machine)[device.group]])
        machine.audit()
        device.enable()
        assert device.regions[0].read_int(0) == 0x010000ED
        machine.deassign(device)


class Stranger:
    """A descriptor that is no group."""

    fd = 0
    number = -1


def test_a_token_where_none_is_used(edu: str, machine: Machine) -> None:
    with host.borrow(edu) as [found]:
        assert found.group is not None
        with pytest.raises(OSError, match="VFIO_GROUP_GET_DEVICE_FD") as refused:
            machine.domain.attach(edu, found.group, uuid.uuid4())
        assert refused.value.errno == errno.EINVAL
        assert "leave out the VF token" in refused.value.__notes__[0]
        assert not machine.domain.active
        machine.audit()
        with Group(found.group) as group, pytest.raises(OSError):
            group.get_device_fd(edu)  # in no container


@pytest.mark.parametrize(
    ("backend", "call"),
    [
        pytest.param(Type1, "VFIO_GROUP_GET_DEVICE_FD", marks=pytest.mark.amdvi(profile="modern", qemu="modern")),
        pytest.param(
            IommufdBackend, "VFIO_DEVICE_BIND_IOMMUFD", marks=pytest.mark.amdvi(profile="next", kernel="next")
        ),
    ],
    ids=["type1", "iommufd"],
)
def test_virtual_functions_need_their_token(sriov: str, backend: BackendFactory, call: str) -> None:
    """The physical function and a virtual one, both on vfio-pci, in two machines: only with a shared token."""
    token, wrong = uuid.uuid4(), uuid.uuid4()
    new = partial(Machine, memory="2M", backend=backend)
    sysfs = host.Sysfs()
    numvfs = sysfs.device_path(host.Bdf.parse(sriov)) / "sriov_numvfs"
    with host.borrow(sriov) as [physical], new() as owner, new() as machine:
        assert physical.group is not None
        device = owner.domain.attach(sriov, physical.group, token)
        sysfs.write(numvfs, "1")
        virtual = sysfs.device(host.Bdf.parse((numvfs.parent / "virtfn0").readlink().name))
        assert (virtual.driver, virtual.group is None) == ("vfio-pci", False)
        assert virtual.group is not None
        for bad, hint in ((None, "one VF token"), (wrong, "use the VF token with which")):
            with pytest.raises(PermissionError, match=call) as refused:
                machine.domain.attach(str(virtual.bdf), virtual.group, bad)
            assert refused.value.errno == errno.EACCES
            assert hint in refused.value.__notes__[0]
            assert not machine.domain.active
            machine.audit()
        function = machine.domain.attach(str(virtual.bdf), virtual.group, token)
        machine.audit()
        owner.domain.detach(device)
        with pytest.raises(PermissionError):  # while the virtual function is open
            owner.domain.attach(sriov, physical.group)
        owner.domain.detach(owner.domain.attach(sriov, physical.group, token))
        machine.domain.detach(function)
        with new() as both:  # one guest may have the two
            devices = [both.assign(bdf, vf_token=token) for bdf in (sriov, virtual.bdf)]
            functions = [host.Bdf.parse(sriov).function, virtual.bdf.function]
            assert (len(both.domain.ledger), [device.number for device in devices]) == (1, functions)
            both.audit()
        sysfs.write(numvfs, "0")
