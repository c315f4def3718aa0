"""Cases of the kernel's VFIO selftests against our classes, in each mode: docs/lab.md has the table.

What other files have is not here: copies by DMA from and to addresses that are and are not mapped, and interrupts
that a device sends (test_containment.py, test_devices.py), VF tokens (test_vfio_device.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from support.modes import MODES, Mode, machines_use
from support.witness import Edu, iommu_events, merged, pattern, without_probe

from kvmpass import host
from kvmpass.dma import IommufdBackend, Type1
from kvmpass.iommufd import Iommufd
from kvmpass.layout import GIB, MIB, PAGE, Range
from kvmpass.machine import AssignedDevice
from kvmpass.memory import HostMapping
from kvmpass.pciregs import COMMAND, COMMAND_DECODING, COMMAND_MASTER
from kvmpass.vfio import Cdev, Device
from kvmpass.vfio.device import MSI, MSIX

pytestmark = pytest.mark.amdvi(profile="next", kernel="next")

AT = 4 * GIB
LAST_PAGE = (1 << 64) - PAGE


class NoMemory:
    """A mapper without memory and without a VM."""

    p2p = False

    def map_all(self) -> None: ...
    def unmap_all(self) -> None: ...
    def file_add(self, fd: int) -> None: ...
    def file_del(self, fd: int) -> None: ...


class Space:
    """One device, and the translation that it is attached to."""

    def __init__(self, mode: Mode, name: str, group: int) -> None:
        self.mode = mode
        self.backend = mode.backend(NoMemory())
        with self.backend.attaching(name, group) as open_device:
            self.device: Device = open_device()()

    def map(self, iova: int, hva: int, size: int) -> None:
        if isinstance(self.backend, IommufdBackend):
            self.backend.iommufd.ioas_map(self.backend._ioas, iova, hva, size, writable=True)
        else:
            cast(Type1, self.backend).container.map_dma(iova, hva, size, writable=True)

    def unmap(self, iova: int, size: int) -> int:
        if isinstance(self.backend, IommufdBackend):
            return self.backend.iommufd.ioas_unmap(self.backend._ioas, iova, size)
        return cast(Type1, self.backend).container.unmap_dma(iova, size)


@pytest.fixture(scope="module", params=list(MODES))
def space(request: pytest.FixtureRequest, igb: str) -> Iterator[Space]:
    mode = MODES[request.param]
    with machines_use(mode), host.borrow(igb) as [found]:
        assert found.group is not None
        space = Space(mode, igb, found.group)
        yield space
        assert space.backend.unmap_rest() == 0
        space.backend.detach(space.device)


@pytest.fixture(scope="module", params=[PAGE, 2 * MIB, GIB], ids=["4K", "2M", "1G"])
def memory(request: pytest.FixtureRequest) -> Iterator[HostMapping]:
    """Memory of each page size, of one page."""
    made = HostMapping(request.param, page=request.param, align=request.param)
    yield made
    made.close()


def refused(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=r"_(UN)?MAP") as caught:
        call()
    assert caught.value.errno == code, caught.value


# --- vfio_dma_mapping_test


def test_memory_of_each_page_size(space: Space, memory: HostMapping) -> None:
    """dma_map_unmap: the kernel's tracepoints have the range once mapped and once unmapped."""
    with iommu_events() as events:
        space.map(AT, memory.address, memory.size)
        assert space.unmap(AT, memory.size) == memory.size
    without_probe(events)
    for kind in ("map", "unmap"):
        assert merged([range_ for what, range_ in events if what == kind]) == [Range(AT, memory.size)]
    assert space.backend.unmap_rest() == 0


def test_the_last_pages(space: Space) -> None:
    """unmap_range and unmap_all at the end of the address space, and overflow beyond it."""
    own = HostMapping(2 * PAGE)
    space.map(LAST_PAGE - PAGE, own.address, PAGE)
    assert space.unmap(LAST_PAGE - PAGE, PAGE) == PAGE
    if space.mode.name == "iommufd":
        space.map(LAST_PAGE, own.address, PAGE)
        assert space.backend.unmap_rest() == PAGE
    else:  # of our own: 6.12 maps it, and does not unmap it
        refused(errno.EINVAL, lambda: space.map(LAST_PAGE, own.address, PAGE))
    refused(errno.EOVERFLOW, lambda: space.map(LAST_PAGE, own.address, 2 * PAGE))
    refused(errno.EOVERFLOW, lambda: space.unmap(LAST_PAGE, 2 * PAGE))
    own.close()


# --- vfio_dma_mapping_mmio_test


def test_bars_by_address(space: Space) -> None:
    """map_full_bar, map_partial_bar, map_bar_misaligned: VFIO's own type 1 maps BARs, iommufd does not."""
    bar = space.device.regions[0]
    [area] = bar.mmap_areas
    odd = HostMapping(area.size, align=GIB, congruent=PAGE, fd=space.device.fd, offset=bar.info.offset)
    whole = bar.mmap(area)
    for mapping, size in ((whole, area.size), (whole, PAGE), (odd, area.size)):
        if space.mode.name == "type1":
            space.map(AT, mapping.address, size)
            assert space.unmap(AT, size) == size
        else:
            refused(errno.EFAULT, lambda mapping=mapping, size=size: space.map(AT, mapping.address, size))
    odd.close()
    whole.close()


# --- vfio_pci_device_test


def test_the_device(space: Space, igb: str) -> None:
    """config_space_read_write, validate_bars, reset."""
    device, config = space.device, space.device.config
    found = host.Sysfs().device(host.Bdf.parse(igb))
    assert (config.read_int(0, 2), config.read_int(2, 2)) == (found.vendor, found.device)
    before = config.read_int(COMMAND, 2)
    assert not before & COMMAND_MASTER
    for value in (before | COMMAND_MASTER, before):
        config.write_int(COMMAND, value, 2)
        assert config.read_int(COMMAND, 2) == value
    mappable = {index: region.mmap_areas for index, region in device.regions.items() if region.mmap_areas}
    assert {0, 1, 3} <= set(mappable)
    for index, areas in mappable.items():
        for area in areas:
            device.regions[index].mmap(area).close()
    assert device.resettable
    device.reset()


@pytest.mark.parametrize("index", [MSI, MSIX], ids=["msi", "msix"])
def test_each_vector(space: Space, index: int) -> None:
    """enable_trigger_disable."""
    irqs = space.device.irqs[index]
    eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(irqs.count)]
    irqs.set_irqs(0, eventfds)
    for vector, eventfd in enumerate(eventfds):
        with pytest.raises(BlockingIOError):
            os.eventfd_read(eventfd)
        irqs.trigger(vector)
        assert os.eventfd_read(eventfd) == 1
    irqs.disable_irqs()
    for eventfd in eventfds:
        os.close(eventfd)


# --- vfio_iommufd_setup_test


def test_what_a_character_device_refuses(edu: str) -> None:
    """bind, get_info_without_bind_fails, bind_bad_iommufd_fails, repeated_bind_fails, attach_detatch_pt and so on."""
    with Iommufd() as iommufd, host.borrow(edu) as [found], Cdev(edu) as device:
        with pytest.raises(OSError, match="VFIO_DEVICE_GET_INFO"):
            device._read_info()
        for wrong, code in ((-2, errno.EINVAL), (device.fd, errno.EBADFD)):
            with pytest.raises(OSError, match="VFIO_DEVICE_BIND_IOMMUFD") as caught:
                device.bind(wrong)
            assert caught.value.errno == code
        device.bind(iommufd.fd)
        assert device.config.read_int(0, 2) == found.vendor
        with pytest.raises(OSError, match="VFIO_DEVICE_BIND_IOMMUFD") as caught:
            device.bind(iommufd.fd)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="VFIO_DEVICE_ATTACH_IOMMUFD_PT") as caught:
            device.attach(0xFFFF_FFFF)
        assert caught.value.errno == errno.ENOENT
        device.attach(iommufd.ioas_alloc())
        device.detach()


# --- no selftest


def test_a_device_reaches_a_files_pages(edu: str) -> None:
    """IOMMU_IOAS_MAP_FILE: from the offset on, and also for writing where the file is open for reading only."""
    file = os.memfd_create("memory")
    os.truncate(file, 4 * PAGE)
    reading = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    with Iommufd() as iommufd, host.borrow(edu), Cdev(edu) as device:
        device.bind(iommufd.fd)
        ioas = iommufd.ioas_alloc()
        device.attach(ioas)
        iommufd.ioas_map_file(ioas, AT, reading, PAGE, 2 * PAGE, writable=True)
        opened = SimpleNamespace(
            regions=device.regions,
            bdf=edu,
            enable=lambda: device.config.write_int(COMMAND, COMMAND_DECODING | COMMAND_MASTER, 2),
        )
        engine, data = Edu(cast(AssignedDevice, opened)), pattern()
        os.pwrite(file, data, 2 * PAGE)
        engine.load(AT + PAGE)
        engine.store(AT)
        assert os.pread(file, len(data), PAGE) == data
        assert os.pread(file, PAGE, 0) == bytes(PAGE), "before the offset"
        assert iommufd.ioas_unmap_all(ioas) == 2 * PAGE
        os.pwrite(file, bytes(len(data)), PAGE)
        engine.store(AT)
        assert os.pread(file, len(data), PAGE) == bytes(len(data)), "it is mapped no more"
    os.close(reading)
    os.close(file)
