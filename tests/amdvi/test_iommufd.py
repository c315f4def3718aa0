"""What the kernel's iommufd does, without and with a device: the rules that the back end relies on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.drivers import PCI, Child, look, set_driver
from support.inside import LAB_ONLY
from support.witness import BUFFER, Edu, locked_bytes, pattern

from kvmpass import host
from kvmpass.host.backend import choose_backend
from kvmpass.iommufd import Iommufd
from kvmpass.layout import MIB, PAGE, Range
from kvmpass.machine import Machine
from kvmpass.memory import HostMapping
from kvmpass.pciregs import COMMAND, COMMAND_DECODING, COMMAND_MASTER
from kvmpass.vfio import Cdev

pytestmark = pytest.mark.amdvi(kernel="full")


@pytest.fixture
def iommufd() -> Iterator[Iommufd]:
    with Iommufd() as made:
        yield made


@pytest.fixture
def memory() -> Iterator[HostMapping]:
    made = HostMapping(2 * MIB)
    yield made
    made.close()


def code(refused: pytest.ExceptionInfo[OSError]) -> str:
    return errno.errorcode[refused.value.errno or 0]


def test_an_address_space(iommufd: Iommufd, memory: HostMapping) -> None:
    ioas, other = iommufd.ioas_alloc(), iommufd.ioas_alloc()
    assert ioas != other
    everything = iommufd.ioas_iova_ranges(ioas)
    assert (everything.allowed, everything.reserved) == ((Range(0, 1 << 64),), ())
    before = locked_bytes("VmPin")
    iommufd.ioas_map(ioas, MIB, memory.address, MIB, writable=True)
    assert locked_bytes("VmPin") == before, "without a device nothing is pinned"
    with pytest.raises(OSError, match="IOMMU_IOAS_MAP") as refused:
        iommufd.ioas_map(ioas, MIB + PAGE, memory.address, PAGE, writable=True)
    assert code(refused) == "EEXIST"
    with pytest.raises(OSError, match="IOMMU_IOAS_UNMAP") as refused:
        iommufd.ioas_unmap(ioas, 8 * MIB, MIB)
    assert code(refused) == "ENOENT"
    assert iommufd.ioas_unmap(ioas, MIB, MIB) == MIB
    assert iommufd.ioas_unmap_all(ioas) == 0
    iommufd.destroy(other)
    with pytest.raises(OSError, match="IOMMU_DESTROY") as refused:
        iommufd.destroy(other)
    assert code(refused) == "ENOENT"


def test_files_are_mapped_where_the_kernel_can(iommufd: Iommufd) -> None:
    ioas, file = iommufd.ioas_alloc(), os.memfd_create("memory")
    try:
        os.truncate(file, MIB)
        if host.Sysfs().kernel() >= (6, 13):
            iommufd.ioas_map_file(ioas, MIB, file, PAGE, MIB - PAGE, writable=True)
            assert iommufd.ioas_unmap_all(ioas) == MIB - PAGE
        else:
            with pytest.raises(OSError, match=r"IOMMU_IOAS_MAP_FILE: .*6\.13") as refused:
                iommufd.ioas_map_file(ioas, MIB, file, 0, MIB, writable=True)
            assert refused.value.errno == errno.EOPNOTSUPP
    finally:
        os.close(file)


def test_a_device(iommufd: Iommufd, memory: HostMapping, edu: str) -> None:
    """Attached to an empty address space it narrows that; attached to another one it reaches what is there."""
    first, second = iommufd.ioas_alloc(), iommufd.ioas_alloc()
    with host.borrow(edu) as [found], Cdev(edu) as device:
        assert not hasattr(device, "regions")
        device.bind(iommufd.fd)
        assert device.config.read_int(0, 2) == found.vendor
        with pytest.raises(OSError, match="VFIO_DEVICE_BIND_IOMMUFD") as refused, Cdev(edu) as again:
            again.bind(iommufd.fd)
        assert code(refused) == "EINVAL"
        with pytest.raises(OSError, match=f"/dev/vfio/{found.group}") as refused:
            os.close(os.open(f"/dev/vfio/{found.group}", os.O_RDWR))
        assert code(refused) == "EBUSY"
        device.attach(first)
        ranges = iommufd.ioas_iova_ranges(first)
        assert Range(0xFEE0_0000, MIB) in ranges.reserved
        for region in found_reserved(found.group):
            assert any(hole.contains(region.range) for hole in ranges.reserved)
        for iova in (0xFEE0_0000, MIB + 512):  # reserved; not on a page
            with pytest.raises(OSError, match="IOMMU_IOAS_MAP") as refused:
                iommufd.ioas_map(first, iova, memory.address, PAGE, writable=True)
            assert code(refused) == "EINVAL"
        assert ranges.alignment == PAGE
        iommufd.ioas_map(first, MIB, memory.address, MIB, writable=True)
        assert locked_bytes("VmPin") == MIB
        with pytest.raises(OSError, match="IOMMU_DESTROY") as refused:
            iommufd.destroy(first)
        assert code(refused) == "EBUSY"
        device.attach(second)
        assert locked_bytes("VmPin") == 0, "nobody is attached to the first any more"
        device.detach()
        assert iommufd.ioas_unmap_all(first) == MIB
        iommufd.ioas_map(second, 0xFEE0_0000, memory.address, PAGE, writable=True)
        with pytest.raises(OSError, match="VFIO_DEVICE_ATTACH_IOMMUFD_PT") as refused:
            device.attach(second)
        assert (code(refused), "reserved region" in refused.value.__notes__[0]) == ("EADDRINUSE", True)
    iommufd.destroy(second)


def test_a_device_that_is_still_open_elsewhere_reaches_nothing(edu: str, edu2: str) -> None:
    """A process that has its descriptor too drives it after it has left, while the machine keeps another device."""
    with host.borrow(edu, edu2), Machine(memory="8M", backend="iommufd") as machine:
        device, kept = machine.assign(edu), machine.assign(edu2)
        data = pattern()
        machine.memory.write(0x1000, data)
        Edu(device).load(0x1000)
        config, registers = device.config.info.offset, device.regions[0].info.offset
        other = os.dup(device.vfio.fd)
        try:
            machine.deassign(device)
            assert os.pread(other, 2, config + COMMAND) == bytes(2), "it was quiesced"
            os.pwrite(other, (COMMAND_DECODING | COMMAND_MASTER).to_bytes(2, "little"), config + COMMAND)
            transfer = ((0x80, BUFFER), (0x88, 0x2000), (0x90, 16), (0x98, 3))  # from the device to memory
            for register, value in transfer:
                os.pwrite(other, value.to_bytes(8, "little"), registers + register)
            deadline = time.monotonic() + 20
            while os.pread(other, 8, registers + 0x98)[0] & 1:
                assert time.monotonic() < deadline, "the edu device's DMA does not end"
                time.sleep(0.01)
            assert machine.memory.read(0x2000, 16) == bytes(16)
            machine.audit()
            bench = Edu(kept)
            bench.load(0x1000)
            bench.store(0x2000)
            assert machine.memory.read(0x2000, 16) == data
            machine.deassign(kept)
            assert not machine.domain.active, "the address space does not wait for it"
        finally:
            os.close(other)


# --- what the bind refuses


def test_dma_of_the_group_belongs_to_others(iommufd: Iommufd, multifunction: str) -> None:
    """To a driver of the host, under the other function of the device; then to another iommufd."""
    group = (PCI / "devices" / multifunction / "iommu_group/devices").iterdir()
    name, sibling = sorted(path.name for path in group)
    with on_vfio(name):
        check_bind_refused(iommufd, name, "bind all devices of its IOMMU group to vfio-pci")
    with host.borrow(name, sibling), Iommufd() as stranger:
        with Cdev(sibling) as other:
            other.bind(stranger.fd)
            check_bind_refused(iommufd, name, "end the processes that use one")
        with Cdev(name) as device:
            device.bind(iommufd.fd)


@pytest.mark.amdvi(profile="no-intremap", kernel="full")
def test_interrupts_are_not_remapped(iommufd: Iommufd, edu: str) -> None:
    """Our own check of the host comes before; this is the kernel's."""
    with on_vfio(edu):
        check_bind_refused(iommufd, edu, "enable interrupt remapping in the firmware")


@contextmanager
def on_vfio(name: str) -> Iterator[None]:
    """Bind a device as somebody with a shell does: ``borrow`` would refuse it."""
    before = look(name).driver
    set_driver(name, "vfio-pci")
    try:
        yield
    finally:
        (PCI / "drivers/vfio-pci/unbind").write_text(name)
        (PCI / "devices" / name / "driver_override").write_text("\n")
        (PCI / "drivers_probe").write_text(name)
        assert look(name).driver == before


def check_bind_refused(iommufd: Iommufd, name: str, hint: str) -> None:
    with Cdev(name) as device, pytest.raises(PermissionError, match=f"VFIO_DEVICE_BIND_IOMMUFD.*{name}") as refused:
        device.bind(iommufd.fd)
    assert hint in refused.value.__notes__[0]


# --- which pages devices write


def test_the_emulated_iommu_does_not_track_writes(iommufd: Iommufd, edu: str, emulated_host: bool) -> None:
    """A page table without that is one for the device; a machine asks for no other."""
    ioas = iommufd.ioas_alloc()
    with host.borrow(edu), Cdev(edu) as device:
        devid = device.bind(iommufd.fd)
        if not emulated_host and iommufd.get_hw_info(devid).dirty_tracking:
            pytest.skip(f"this IOMMU tracks writes: {LAB_ONLY}")
        assert not iommufd.get_hw_info(devid).dirty_tracking
        with pytest.raises(OSError, match="IOMMU_HWPT_ALLOC") as refused:
            iommufd.hwpt_alloc(devid, ioas, dirty_tracking=True)
        assert refused.value.errno == errno.EOPNOTSUPP
        assert "HDSup" in refused.value.__notes__[0]
        hwpt = iommufd.hwpt_alloc(devid, ioas)
        device.attach(hwpt)
        with pytest.raises(OSError, match="IOMMU_HWPT_SET_DIRTY_TRACKING") as refused:
            iommufd.hwpt_set_dirty_tracking(hwpt, True)
        assert refused.value.errno == errno.EOPNOTSUPP
        device.detach()
        iommufd.destroy(hwpt)
    iommufd.destroy(ioas)


class MockDevice:
    """A device of the kernel's own mock IOMMU (drivers/iommu/iommufd/selftest.c), attached to an IOAS.

    Its memory consists of pages whose writes a caller makes up.
    """

    COMMAND = 0x3BA0  # IOMMU_TEST_CMD: size, operation, object, 0; a union of 48 bytes; 0 (iommufd_test.h)

    def __init__(self, iommufd: Iommufd, ioas: int, *, dirty_tracking: bool) -> None:
        self.iommufd = iommufd
        made = self._command(12, ioas, struct.pack("<IIII", 0, 0, 0, not dirty_tracking))
        self.number, _, self.devid = struct.unpack_from("<III", made, 16)

    def _command(self, operation: int, number: int, data: bytes) -> bytearray:
        command = bytearray(struct.pack("<IIII", 72, operation, number, 0) + data.ljust(56, b"\0"))
        fcntl.ioctl(self.iommufd.fd, self.COMMAND, command)
        return command

    def attach(self, hwpt: int) -> None:
        self._command(10, self.number, struct.pack("<I", hwpt))

    def write(self, hwpt: int, range_: Range, pages: set[int]) -> None:
        """Mark pages of ``range_`` as written, by their numbers. The IOMMU's own are half as large."""
        bits = sum(1 << 2 * page for page in pages)
        bitmap = ctypes.create_string_buffer(bits.to_bytes(range_.size // PAGE // 4, "little"))
        place = (range_.start, range_.size, PAGE // 2, ctypes.addressof(bitmap))
        done = self._command(13, hwpt, struct.pack("<IxxxxQQQQQ", 0, *place, 0))
        assert struct.unpack_from("<Q", done, 56) == (len(pages),)


@pytest.mark.amdvi(profile="no-iommu", kernel="full")
def test_written_pages_are_known_once(iommufd: Iommufd, memory: HostMapping) -> None:
    """On the kernel's mock IOMMU, since the emulated one tracks none. Linux 6.12 needs a host without another."""
    if not has_mock_iommu():
        pytest.skip("this kernel has no mock IOMMU: CONFIG_IOMMUFD_TEST would make it run")
    ioas, where = iommufd.ioas_alloc(), Range(16 * MIB, MIB)
    device = MockDevice(iommufd, ioas, dirty_tracking=True)
    assert iommufd.get_hw_info(device.devid).dirty_tracking
    hwpt = iommufd.hwpt_alloc(device.devid, ioas, dirty_tracking=True)
    device.attach(hwpt)
    iommufd.ioas_map(ioas, where.start, memory.address, where.size, writable=True)
    iommufd.hwpt_set_dirty_tracking(hwpt, True)
    with pytest.raises(OSError, match="IOMMU_HWPT_GET_DIRTY_BITMAP") as refused:
        iommufd.hwpt_get_dirty_bitmap(hwpt, Range(where.start + 1, where.size))
    assert code(refused) == "EINVAL", "it does not consist of pages"
    assert not any(iommufd.hwpt_get_dirty_bitmap(hwpt, where))
    written = {0, 7, 8, 63, 64, 255}
    device.write(hwpt, where, written)
    found = int.from_bytes(iommufd.hwpt_get_dirty_bitmap(hwpt, where), "little")
    assert {page for page in range(where.size // PAGE) if found >> page & 1} == written
    assert not any(iommufd.hwpt_get_dirty_bitmap(hwpt, where)), "reading clears"
    iommufd.hwpt_set_dirty_tracking(hwpt, False)
    other = MockDevice(iommufd, ioas, dirty_tracking=False)
    assert not iommufd.get_hw_info(other.devid).dirty_tracking
    with pytest.raises(OSError, match="IOMMU_HWPT_ALLOC") as refused:
        iommufd.hwpt_alloc(other.devid, ioas, dirty_tracking=True)
    assert refused.value.errno == errno.EOPNOTSUPP


def has_mock_iommu() -> bool:
    return any(line.split()[-1] == "iommufd_test" for line in Path("/proc/kallsyms").read_text().splitlines())


def found_reserved(group: int | None) -> list[host.sysfs.Reserved]:
    assert group is not None
    return list(host.Sysfs().group(group).reserved)


def test_another_process_has_it(edu: str) -> None:
    """By its own node, and by that of its group: each is named where it is refused."""
    with host.borrow(edu) as [found]:
        with Machine(memory="8M", backend="iommufd") as machine:
            machine.assign(edu)
            # auto has chosen iommufd before, and does not try type 1 after it.
            with Machine(memory="8M", backend="auto") as other, pytest.raises(OSError, match="BIND") as refused:
                other.assign(edu)
            assert str(other.backend) == "iommufd: available to this user"
            assert "has the device open" in refused.value.__notes__[0]
            assert (other.devices, other.domain.active) == ([], False)
        group = os.open(f"/dev/vfio/{found.group}", os.O_RDWR)
        with Machine(memory="8M", backend="iommufd") as machine:
            with pytest.raises(OSError, match="BIND") as refused:
                machine.assign(edu)
            assert "(/dev/vfio/GROUP)" in refused.value.__notes__[0]
            os.close(group)
            device = machine.assign(edu)
            machine.audit()
            data = pattern()
            machine.memory.write(0x1000, data)
            bench = Edu(device)
            bench.load(0x1000)
            bench.store(0x2000)
            assert machine.memory.read(0x2000, 16) == data


def test_more_than_the_user_may_lock(edu: str) -> None:
    """The call that maps is the one that is refused, and leaves nothing."""

    def work() -> None:
        with Machine(memory="64M", backend="iommufd") as machine:
            machine.populate()
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (MIB, MIB))
            drop_capabilities()
            with pytest.raises(OSError, match="IOMMU_IOAS_MAP: Cannot allocate memory") as refused:
                machine.assign(edu)
            assert "which iommufd counts for each user" in refused.value.__notes__[0]
            assert (machine.devices, machine.domain.active, machine.domain.ledger) == ([], False, [])

    with host.borrow(edu):
        assert Child(work).wait() == 0


def test_all_processes_of_the_user_count(edu: str, edu2: str) -> None:
    """Type 1 counts each process for itself: with it both would be there."""

    def machine() -> Machine:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (48 * MIB, 48 * MIB))
        made = Machine(memory="32M", backend="iommufd")
        made.populate()
        drop_capabilities()
        return made

    def first() -> None:
        machine().assign(edu)
        os.close(told)
        signal.pause()

    def second() -> None:
        with machine() as made:
            with pytest.raises(OSError, match="IOMMU_IOAS_MAP: Cannot allocate memory") as refused:
                made.assign(edu2)
            assert "for each user over all processes" in refused.value.__notes__[0]

    with host.borrow(edu, edu2):
        reader, told = os.pipe()
        child = Child(first)
        os.close(told)
        try:
            assert os.read(reader, 1) == b""
            assert Child(second).wait() == 0
        finally:
            os.close(reader)
            assert child.kill() == -signal.SIGKILL


def drop_capabilities() -> None:
    """All of this process's: with CAP_IPC_LOCK there is no limit (capset(2), version 3)."""
    header, data = (ctypes.c_uint32 * 2)(0x2008_0522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, data) == 0


def test_without_the_right_to_dev_iommu_it_is_type_1(edu: str) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * MIB, 8 * MIB))
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        assert str(choose_backend(host.Sysfs())) == "type1: this user may not open /dev/iommu"
        with Machine(memory="8M", backend="auto") as machine:
            machine.assign(edu)
            machine.audit()
            assert str(machine.backend).startswith("type1: this user may not open /dev/iommu, /dev/vfio/devices/vfio")

    with host.borrow(edu) as [found]:
        nodes = {Path("/dev/kvm"): 0o666, Path("/dev/iommu"): 0o600, Path(f"/dev/vfio/{found.group}"): 0o666}
        before = {node: node.stat().st_mode for node in nodes}
        for node, mode in nodes.items():
            node.chmod(mode)
        try:
            assert Child(work).wait() == 0
        finally:
            for node, mode in before.items():
                node.chmod(mode)
