"""What VFIO refuses: every refusal is an ``OSError`` with the call's name, and changes nothing.

Where our own C never sends what is wrong (a short structure, an unknown flag) the test speaks to the kernel itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from support.type1 import container_of, groups_of
from support.witness import locked_bytes

from kvmpass import host
from kvmpass.errors import LayoutError
from kvmpass.layout import GIB, MIB, PAGE
from kvmpass.machine import AssignedDevice, Machine
from kvmpass.memory import HostMapping
from kvmpass.pciregs import COMMAND
from kvmpass.vfio import Container, Group
from kvmpass.vfio.device import CONFIG, ERR, INTX, MSI, MSIX, REQ, Device

FREE = 5 * GIB
LAST_PAGE = (1 << 64) - PAGE
SEVEN = (7, 0)  # 6.12 and 7.3 are known; which kernel between them changed is not
ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")

# include/uapi/linux/vfio.h: _IO(';', 100 + n)
GROUP_GET_STATUS, DEVICE_GET_INFO, REGION_INFO, IRQ_INFO, SET_IRQS = (0x3B64 + n for n in (3, 7, 8, 9, 10))
HOT_RESET_INFO, HOT_RESET = IOMMU_GET_INFO, MAP_DMA = 0x3B64 + 12, 0x3B64 + 13
UNMAP_DMA = 0x3B64 + 14


class Bench:
    """A machine with one device, the container that it is in, and memory of our own to map."""

    def __init__(self, machine: Machine, device: AssignedDevice, own: HostMapping) -> None:
        container = container_of(machine)
        self.machine, self.assigned, self.own = machine, device, own
        self.device: Device = device.vfio
        self.container: Container = container
        self.group: Group = groups_of(machine)[device.group]

    def map(self, iova: int, size: int, *, offset: int = 0, writable: bool = True) -> None:
        self.container.map_dma(iova, self.own.address + offset, size, writable=writable)

    def check(self) -> None:
        """The ledger is right, and the kernel has locked what the ledger says."""
        self.machine.audit()
        assert locked_bytes() == sum(mapping.size for mapping in self.machine.domain.ledger)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine(memory="4M") as machine:
        machine.memory.add_rom(0xF000_0000, b"rom")
        yield machine


@pytest.fixture(scope="module")
def bench(edu: str, machine: Machine) -> Iterator[Bench]:
    own = HostMapping(4 * MIB, align=2 * MIB)
    with host.borrow(edu):
        device = machine.assign(edu)
        for index in (INTX, REQ):  # what the machine has switched on
            device.vfio.irqs[index].disable_irqs()
        yield Bench(machine, device, own)
        machine.deassign(device)
    own.close()


@pytest.fixture(autouse=True)
def unchanged(bench: Bench) -> Iterator[None]:
    bench.check()
    yield
    bench.check()


def refused(code: int, name: str, call: Callable[[], object]) -> OSError:
    """``call`` must fail with ``code``, naming the system call."""
    with pytest.raises(OSError, match=rf"^\[Errno \d+\] {name}: ") as caught:
        call()
    assert caught.value.errno == code
    return caught.value


def wrapping(start: int, size: int) -> int:
    """The error for a range that starts there: 7.3 tells those that do not end within 64 bits from others."""
    return errno.EOVERFLOW if start + size > 1 << 64 and host.Sysfs().kernel() >= SEVEN else errno.EINVAL


def raw(fd: int, number: int, form: str, *values: int, room: int = 64) -> int:
    """The kernel's own answer to a structure: 0 or an errno."""
    buffer = bytearray(struct.pack(form, *values).ljust(room, b"\0"))
    try:
        fcntl.ioctl(fd, number, buffer)
    except OSError as error:
        return error.errno or 0
    return 0


# --- mapping


@pytest.mark.parametrize(
    "iova, size, offset",
    [
        (FREE, 0, 0),
        (FREE, 100, 0),
        (FREE, PAGE + 1, 0),
        (FREE + 100, PAGE, 0),
        (FREE, PAGE, 100),
        (0xFEE0_0000, PAGE, 0),
        (0xFEE0_0000 - PAGE, 2 * PAGE, 0),
        (0xFEEF_F000, 2 * PAGE, 0),
        (0xFD_0000_0000, MIB, 0),
        (0x100_0000_0000 - PAGE, 2 * PAGE, 0),
        (LAST_PAGE, 2 * PAGE, 0),
        (LAST_PAGE - PAGE, 4 * PAGE, 0),
        ((1 << 64) - 1, PAGE, 0),
    ],
    ids=lambda value: f"{value:x}",
)
def test_what_cannot_be_mapped(bench: Bench, iova: int, size: int, offset: int) -> None:
    """Zero, fractions of pages, the MSI range and the HyperTransport hole and their edges, addresses that wrap."""
    refused(wrapping(iova, size), "VFIO_IOMMU_MAP_DMA", lambda: bench.map(iova, size, offset=offset))
    assert bench.container.unmap_dma(FREE, 8 * MIB) == 0


def test_guest_memory_beyond_the_address_width(bench: Bench) -> None:
    """Refused before KVM or VFIO are asked: nothing is left behind."""
    before = (bench.machine.memslots.ledger, bench.machine.domain.ledger)
    for gpa in (LAST_PAGE, 1 << 64, 1 << 52):
        with pytest.raises(LayoutError, match="beyond 52 bits"):
            bench.machine.memory.add_ram(gpa, PAGE)
    assert (bench.machine.memslots.ledger, bench.machine.domain.ledger) == before
    bench.machine.audit()


def test_the_last_page_of_the_address_space(bench: Bench) -> None:
    """The page before it can be mapped; the last one is refused, as 6.12 would map it and not unmap it."""
    bench.map(LAST_PAGE - PAGE, PAGE)
    assert bench.container.unmap_dma(LAST_PAGE - PAGE, PAGE) == PAGE
    for iova, size in ((LAST_PAGE, PAGE), (LAST_PAGE - PAGE, 2 * PAGE)):
        refused(errno.EINVAL, "VFIO_IOMMU_MAP_DMA", lambda iova=iova, size=size: bench.map(iova, size))
    assert bench.container.unmap_dma(LAST_PAGE, PAGE) == 0


def test_addresses_beyond_64_bits(bench: Bench) -> None:
    for iova, size in ((-PAGE, PAGE), (1 << 64, PAGE), (FREE, -PAGE), (FREE, 1 << 64)):
        with pytest.raises(OverflowError):
            bench.map(iova, size)
        with pytest.raises(OverflowError):
            bench.container.unmap_dma(iova, size)


def test_memory_that_cannot_be_pinned(bench: Bench) -> None:
    gone = HostMapping(2 * PAGE)
    address = gone.address
    gone.close()
    error = refused(
        errno.EFAULT,
        "VFIO_IOMMU_MAP_DMA",
        lambda: bench.container.map_dma(FREE, address, 2 * PAGE, writable=True),
    )
    assert "can be pinned" in error.__notes__[0]
    refused(
        wrapping(LAST_PAGE, 2 * PAGE),
        "VFIO_IOMMU_MAP_DMA",
        lambda: bench.container.map_dma(FREE, LAST_PAGE, 2 * PAGE, writable=True),
    )
    constant = HostMapping(PAGE, writable=False)
    refused(
        errno.EFAULT,
        "VFIO_IOMMU_MAP_DMA",
        lambda: bench.container.map_dma(FREE, constant.address, PAGE, writable=True),
    )
    bench.container.map_dma(FREE, constant.address, PAGE, writable=False)
    assert bench.container.unmap_dma(FREE, PAGE) == PAGE
    constant.close()


def test_overlaps(bench: Bench) -> None:
    bench.map(FREE, 2 * MIB)
    try:
        for iova, size in (
            (FREE, 2 * MIB),
            (FREE + MIB, PAGE),
            (FREE - PAGE, 2 * PAGE),
            (FREE + 2 * MIB - PAGE, 2 * PAGE),
            (FREE - PAGE, 2 * MIB + 2 * PAGE),
            (0, PAGE),
        ):
            refused(errno.EEXIST, "VFIO_IOMMU_MAP_DMA", lambda iova=iova, size=size: bench.map(iova, size))
        for iova in (FREE - PAGE, FREE + 2 * MIB):
            bench.map(iova, PAGE)
            assert bench.container.unmap_dma(iova, PAGE) == PAGE
    finally:
        assert bench.container.unmap_dma(FREE, 2 * MIB) == 2 * MIB


def test_structures_and_flags_of_map(bench: Bench) -> None:
    fd, hva = bench.container.fd, bench.own.address
    for argsz, flags, wanted in (
        (0, 3, errno.EINVAL),
        (31, 3, errno.EINVAL),
        (32, 0, errno.EINVAL),  # neither reading nor writing
        (32, 1 << 5, errno.EINVAL),
        (32, 3 | 1 << 31, errno.EINVAL),
        (32, 3, 0),
    ):
        assert raw(fd, MAP_DMA, "=IIQQQ", argsz, flags, hva, FREE, PAGE) == wanted, (argsz, flags)
    assert bench.container.unmap_dma(FREE, PAGE) == PAGE


# --- unmapping


def test_mapping_again_and_unmapping_again(bench: Bench) -> None:
    for size in (PAGE, 2 * MIB):
        bench.map(FREE, size)
        assert bench.container.unmap_dma(FREE, size) == size
        assert bench.container.unmap_dma(FREE, size) == 0


def test_parts_of_a_mapping_cannot_be_unmapped(bench: Bench) -> None:
    """Version 2 of type 1 has no holes: a mapping goes as it came, alone or together with its neighbours."""
    bench.map(FREE, 2 * MIB)
    bench.map(FREE + 2 * MIB, PAGE)
    for iova, size in (
        (FREE, PAGE),
        (FREE + MIB, PAGE),
        (FREE + 2 * MIB - PAGE, PAGE),
        (FREE - PAGE, 2 * PAGE),
        (FREE + 2 * MIB - PAGE, 2 * PAGE),
    ):
        refused(
            errno.EINVAL,
            "VFIO_IOMMU_UNMAP_DMA",
            lambda iova=iova, size=size: bench.container.unmap_dma(iova, size),
        )
    assert bench.container.unmap_dma(FREE - MIB, 8 * MIB) == 2 * MIB + PAGE


def test_what_cannot_be_unmapped(bench: Bench) -> None:
    for iova, size in (
        (FREE, 0),
        (FREE, 100),
        (FREE + 100, PAGE),
        (LAST_PAGE, 2 * PAGE),
        (PAGE, LAST_PAGE + PAGE - 1),
    ):
        refused(
            errno.EINVAL if size % PAGE else wrapping(iova, size),  # pages come first
            "VFIO_IOMMU_UNMAP_DMA",
            lambda iova=iova, size=size: bench.container.unmap_dma(iova, size),
        )


def test_structures_and_flags_of_unmap(bench: Bench) -> None:
    fd = bench.container.fd
    bench.map(FREE, PAGE)
    for argsz, flags, iova, size in (
        (0, 0, FREE, PAGE),
        (23, 0, FREE, PAGE),
        (24, 1 << 7, FREE, PAGE),
        (24, 2, FREE, 0),  # everything, and yet a place
        (24, 2, 0, PAGE),
        (24, 3, 0, 0),  # everything with a dirty bitmap
    ):
        assert raw(fd, UNMAP_DMA, "=IIQQ", argsz, flags, iova, size) == errno.EINVAL, (argsz, flags, iova, size)
    assert bench.container.unmap_dma(FREE, PAGE) == PAGE


def test_unmapping_everything_at_once(edu2: str) -> None:
    with host.borrow(edu2), Machine(memory="4M") as machine:
        machine.assign(edu2)
        container = container_of(machine)
        assert container.unmap_all() == 4 * MIB
        assert container.unmap_all() == 0
        for region in machine.memory:
            container.map_dma(region.gpa, region.hva, region.size, writable=True)


def test_too_many_mappings(edu2: str, machine: Machine) -> None:
    """The kernel's limit of entries: the device that would go over it does not join, and nothing is left."""
    before = ENTRY_LIMIT.read_text()
    try:
        ENTRY_LIMIT.write_text("2")
        with host.borrow(edu2), Machine(memory="2M") as other:
            for number in range(2):
                other.memory.add_rom(GIB + number * MIB, b"rom")
            locked = locked_bytes()
            error = refused(errno.ENOSPC, "VFIO_IOMMU_MAP_DMA", lambda: other.assign(edu2))
            assert "dma_entry_limit" in error.__notes__[0]
            assert (other.domain.active, other.domain.ledger, locked_bytes()) == (False, [], locked)
            other.audit()
            other.memory.remove(next(region for region in other.memory if region.kind.value == "rom"))
            other.assign(edu2)
            refused(errno.ENOSPC, "VFIO_IOMMU_MAP_DMA", lambda: other.memory.add_ram(2 * GIB, MIB))
            other.audit()
    finally:
        ENTRY_LIMIT.write_text(before)


def test_a_container_without_a_group() -> None:
    with Container() as container, ExitStack() as own:
        mapping = HostMapping(PAGE)
        own.callback(mapping.close)
        refused(errno.EINVAL, "VFIO_SET_IOMMU", container.set_iommu)
        refused(errno.EINVAL, "VFIO_IOMMU_GET_INFO", container.iova_ranges)
        refused(
            errno.EINVAL,
            "VFIO_IOMMU_MAP_DMA",
            lambda: container.map_dma(0, mapping.address, PAGE, writable=True),
        )
        refused(errno.EINVAL, "VFIO_IOMMU_UNMAP_DMA", lambda: container.unmap_dma(0, PAGE))


def test_a_group_has_one_owner_and_one_container(bench: Bench) -> None:
    refused_open = pytest.raises(OSError, match=rf"/dev/vfio/{bench.group.number}")
    with refused_open as caught:
        Group(bench.group.number)
    assert caught.value.errno == errno.EBUSY
    with Container() as other:
        refused(errno.EINVAL, "VFIO_GROUP_SET_CONTAINER", lambda: bench.group.set_container(other))
    refused(errno.EBUSY, "VFIO_GROUP_UNSET_CONTAINER", bench.group.unset_container)
    refused(errno.ENODEV, "VFIO_GROUP_GET_DEVICE_FD", lambda: bench.group.get_device_fd("0000:ff:1f.7"))


# --- what is asked


def test_short_structures(bench: Bench) -> None:
    container, group, device = bench.container.fd, bench.group.fd, bench.device.fd
    for fd, number, least in (
        (container, IOMMU_GET_INFO, 16),
        (group, GROUP_GET_STATUS, 8),
        (device, DEVICE_GET_INFO, 16),
        (device, REGION_INFO, 32),
        (device, IRQ_INFO, 16),
    ):
        for argsz in (0, 4, least - 1):
            assert raw(fd, number, "=I", argsz) == errno.EINVAL, (hex(number), argsz)
        assert raw(fd, number, "=I", least) == 0, hex(number)


def test_calls_and_indices_that_do_not_exist(bench: Bench) -> None:
    assert raw(bench.device.fd, 0x3BFF, "=I", 64) == errno.ENOTTY
    assert raw(bench.device.fd, REGION_INFO, "=III", 64, 0, 1000) == errno.EINVAL
    assert raw(bench.device.fd, IRQ_INFO, "=III", 16, 0, REQ + 1) == errno.EINVAL
    assert set(bench.device.regions) == {0, CONFIG}


# --- interrupts


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_indices_vectors_and_counts_of_interrupts(bench: Bench, eventfd: int) -> None:
    irqs = bench.device.irqs[MSI]
    count = irqs.count
    assert count >= 1
    for index, start, eventfds in (
        (REQ + 1, 0, [eventfd]),
        (0xFFFF_FFFF, 0, [eventfd]),
        (MSI, count, [eventfd]),
        (MSI, 0, [eventfd] * (count + 1)),
        (MSI, 0xFFFF_FFFF, [eventfd]),
        (MSI, 0xFFFF_FFFF, []),
        (MSIX, 0, [eventfd]),  # edu has none
        (REQ, 1, [eventfd]),
        (REQ, 0, [eventfd, eventfd]),
    ):
        refused(
            errno.EINVAL,
            "VFIO_DEVICE_SET_IRQS",
            lambda index=index, start=start, eventfds=eventfds: replace(irqs, index=index).set_irqs(start, eventfds),
        )
    refused(errno.E2BIG, "VFIO_DEVICE_SET_IRQS", lambda: irqs.set_irqs(0, [eventfd] * 2049))


def test_descriptors_that_are_no_eventfds(bench: Bench) -> None:
    closed = os.eventfd(0)
    os.close(closed)
    refused(errno.EBADF, "VFIO_DEVICE_SET_IRQS", lambda: bench.device.irqs[MSI].set_irqs(0, [closed]))
    refused(errno.EINVAL, "VFIO_DEVICE_SET_IRQS", lambda: bench.device.irqs[REQ].set_irqs(0, [bench.device.fd]))
    for index in (INTX, MSI, REQ, INTX):
        bench.device.irqs[index].disable_irqs()  # all are off
    # edu has none of them, but that Linux 7.3 has ERR for every function.
    for index in (MSIX, *(() if host.Sysfs().kernel() >= SEVEN else (ERR,)), REQ + 1):
        absent = replace(bench.device.irqs[MSIX], index=index)
        refused(errno.EINVAL, "VFIO_DEVICE_SET_IRQS", absent.disable_irqs)


def test_structures_and_flags_of_interrupts(bench: Bench, eventfd: int) -> None:
    trigger, fds, none = 1 << 5, 1 << 2, 1 << 0
    for argsz, flags, count, wanted in (
        (0, fds | trigger, 1, errno.EINVAL),
        (19, fds | trigger, 1, errno.EINVAL),
        (20, fds | trigger, 1, errno.EINVAL),  # no room for the descriptor
        (24, fds | none | trigger, 1, errno.EINVAL),
        (24, fds, 1, errno.ENOTTY),  # no action
        (24, trigger, 1, errno.EINVAL),  # no data type
        (24, fds | trigger | 1 << 6, 1, errno.EINVAL),
        (24, fds | trigger, 0, errno.ERANGE),  # MSI without a vector
        (24, fds | trigger, 0xFFFF_FFFF, errno.EINVAL),
    ):
        got = raw(bench.device.fd, SET_IRQS, "=IIIIIi", argsz, flags, MSI, 0, count, eventfd)
        assert got == wanted, (argsz, flags, count)


# --- registers


def test_the_edges_of_regions(bench: Bench) -> None:
    bench.assigned.enable()
    bar, config = bench.device.regions[0], bench.device.config
    assert len(bar.read(bar.size - 4, 4)) == 4
    assert len(config.read(config.size - 4, 4)) == 4
    for region in (bar, config):
        assert region.read(region.size, 0) == b""
        for offset, size in ((region.size, 1), (region.size - 2, 4), (-4, 4), (0, region.size + 1), (1 << 63, 4)):
            with pytest.raises(IndexError, match="is outside region"):
                region.read(offset, size)
            if 0 <= size < 16:
                with pytest.raises(IndexError, match="is outside region"):
                    region.write(offset, bytes(size))


def test_accesses_outside_of_regions_are_refused_by_the_kernel(bench: Bench) -> None:
    """Behind our own checks: past the end of a BAR, of configuration space, in a region that the device lacks."""
    bench.assigned.enable()
    fd, bar, config = bench.device.fd, bench.device.regions[0].info, bench.device.config.info
    with pytest.raises(OSError) as caught:
        os.pread(fd, 4, bar.offset + bar.size)
    assert caught.value.errno == errno.EINVAL
    assert len(os.pread(fd, 8, bar.offset + bar.size - 4)) == 4
    with pytest.raises(OSError) as caught:
        os.pread(fd, 4, 1 << 40)  # region 1
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:
        os.pread(fd, 4, config.offset + config.size)
    assert caught.value.errno == errno.EFAULT


def test_registers_while_decoding_is_off(bench: Bench) -> None:
    bar, config = bench.device.regions[0], bench.device.config
    config.write_int(COMMAND, config.read_int(COMMAND, 2) & ~2, 2)
    error = refused(errno.EIO, "pread", lambda: bar.read_int(0))
    assert "decoding" in error.__notes__[0]
    refused(errno.EIO, "pwrite", lambda: bar.write_int(4, 1))
    bench.assigned.enable()
    assert bar.read_int(0) == 0x010000ED


# --- hot reset


class Descriptor:
    """Something with a descriptor, in place of a group."""

    def __init__(self, fd: int) -> None:
        self.fd, self.number = fd, fd


def test_groups_of_a_hot_reset(bench: Bench, bridged: str) -> None:
    with host.borrow(bridged), Machine(memory="2M") as other:
        device = other.assign(bridged)
        own = groups_of(other)[device.group]

        def reset(*groups: object) -> Callable[[], None]:
            return lambda: device.vfio.pci_hot_reset(list(groups))  # type: ignore[arg-type]

        name = "VFIO_DEVICE_PCI_HOT_RESET"
        refused(errno.EINVAL, name, reset())
        refused(errno.EINVAL, name, reset(bench.group))
        refused(errno.EINVAL, name, reset(own, bench.group))  # more groups than devices
        refused(errno.EINVAL, name, reset(Descriptor(device.vfio.fd)))
        refused(errno.EBADF, name, reset(Descriptor(1 << 20)))
        refused(errno.E2BIG, name, reset(*[own] * 1025))
        for argsz, flags in ((0, 0), (11, 0), (16, 1)):
            assert raw(device.vfio.fd, HOT_RESET, "=IIIi", argsz, flags, 1, own.fd) == errno.EINVAL, (argsz, flags)
        assert raw(device.vfio.fd, HOT_RESET_INFO, "=III", 11, 0, 0) == errno.EINVAL
        assert raw(device.vfio.fd, HOT_RESET_INFO, "=III", 12, 0, 0) == errno.ENOSPC
        device.enable()
        assert device.regions[0].read_int(0) == 0x010000ED, "nothing was reset"
        other.audit()
        device.vfio.pci_hot_reset([own])
