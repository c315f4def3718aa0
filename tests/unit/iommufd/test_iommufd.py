"""What iommufd's answers become; the C functions are stood in for."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from support.bare import FakeLib, bare

import kvmpass.iommufd.iommufd
from kvmpass.errors import BadDescriptor
from kvmpass.iommufd import HwInfo, Iommufd, IovaRanges
from kvmpass.layout import GIB, MIB, Range


@pytest.fixture
def iommufd() -> Iommufd:
    one: Iommufd = bare(Iommufd)
    return one


def use(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., int]) -> None:
    monkeypatch.setattr(kvmpass.iommufd.iommufd, "lib", FakeLib(**functions))


def test_a_kernel_without_it(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="iommu"):
        Iommufd(str(tmp_path / "iommu"))


def test_ranges_are_with_their_last_byte(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(fd: int, ioas: int, out: Any) -> int:
        assert (fd, ioas) == (1000, 7)
        out.alignment, out.count = 4096, 3
        spans = ((0, 0xFEDF_FFFF), (0xFEF0_0000, 0xFC_FFFF_FFFF), (1 << 40, (1 << 64) - 1))
        for place, (first, last) in zip(out.ranges, spans, strict=False):
            place.first, place.second = first, last
        return 0

    use(monkeypatch, iommufd_ioas_iova_ranges=fill)
    found = iommufd.ioas_iova_ranges(7)
    assert found.allowed == (
        Range(0, 0xFEE0_0000),
        Range(0xFEF0_0000, 0xFD_0000_0000 - 0xFEF0_0000),
        Range(1 << 40, (1 << 64) - (1 << 40)),
    )
    assert found.reserved == (Range(0xFEE0_0000, MIB), Range(0xFD_0000_0000, 12 * GIB))
    assert found.alignment == 4096


@pytest.mark.parametrize(
    "allowed, reserved",
    [
        ((), (Range(0, 1 << 64),)),
        ((Range(0, 1 << 64),), ()),
        ((Range(MIB, GIB),), (Range(0, MIB), Range(GIB + MIB, (1 << 64) - GIB - MIB))),
    ],
)
def test_reserved_is_what_is_not_allowed(allowed: tuple[Range, ...], reserved: tuple[Range, ...]) -> None:
    assert IovaRanges(allowed, 4096).reserved == reserved


def test_what_is_read_only_stays_read_only(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def note(*arguments: int) -> int:
        calls.append(arguments)
        return 0

    use(monkeypatch, iommufd_ioas_map=note, iommufd_ioas_map_file=note)
    for writable in (True, False):
        iommufd.ioas_map(1, GIB, 0x7000, MIB, writable=writable)
        iommufd.ioas_map_file(1, GIB, 5, 0x2000, MIB, writable=writable)
    fixed, write, read = 1, 2, 4  # include/uapi/linux/iommufd.h
    for flags, both in ((fixed | write | read, calls[:2]), (fixed | read, calls[2:])):
        assert both == [(1000, flags, 1, 0x7000, MIB, GIB), (1000, flags, 1, 5, 0x2000, MIB, GIB)]


@pytest.mark.parametrize(
    "code, hint",
    [(errno.ENOMEM, "for each user"), (errno.EFAULT, "can be pinned")],
)
def test_what_a_refused_mapping_says(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch, code: int, hint: str) -> None:
    use(monkeypatch, iommufd_ioas_map=lambda *_: -code)
    with pytest.raises(OSError, match=r"IOMMU_IOAS_MAP: .*0x40000000") as refused:
        iommufd.ioas_map(1, GIB, 0x7000, MIB, writable=True)
    assert refused.value.errno == code
    assert hint in refused.value.__notes__[0]


def test_files_are_mapped_by_newer_kernels(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, iommufd_ioas_map_file=lambda *_: -errno.ENOTTY)
    with pytest.raises(OSError, match=r"IOMMU_IOAS_MAP_FILE: .*6\.13") as refused:
        iommufd.ioas_map_file(1, 0, 3, 0, MIB, writable=True)
    assert refused.value.errno == errno.EOPNOTSUPP


def test_unmapping_says_how_much_there_was(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def unmap(fd: int, ioas: int, iova: int, size: int, out: Any) -> int:
        calls.append((ioas, iova, size))
        out[0] = 0x3000
        return 0

    use(monkeypatch, iommufd_ioas_unmap=unmap)
    assert iommufd.ioas_unmap(4, GIB, MIB) == iommufd.ioas_unmap_all(4) == 0x3000
    assert calls == [(4, GIB, MIB), (4, 0, (1 << 64) - 1)]


def test_the_iommu_says_whether_it_tracks_writes(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(capabilities: int) -> Callable[..., int]:
        def get(fd: int, devid: int, out: Any) -> int:
            assert (fd, devid) == (1000, 3)
            out[0] = capabilities
            return 0

        return get

    use(monkeypatch, iommufd_get_hw_info=info(0b110))
    assert iommufd.get_hw_info(3) == HwInfo(dirty_tracking=False)
    use(monkeypatch, iommufd_get_hw_info=info(0b101))
    assert iommufd.get_hw_info(3) == HwInfo(dirty_tracking=True)


def test_a_page_table_with_and_without_dirty_tracking(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def alloc(fd: int, flags: int, devid: int, ioas: int, out: Any) -> int:
        calls.append((flags, devid, ioas))
        out[0] = 9
        return 0

    use(monkeypatch, iommufd_hwpt_alloc=alloc)
    assert iommufd.hwpt_alloc(3, 7) == iommufd.hwpt_alloc(3, 7, dirty_tracking=True) == 9
    assert calls == [(0, 3, 7), (2, 3, 7)]  # include/uapi/linux/iommufd.h
    use(monkeypatch, iommufd_hwpt_alloc=lambda *_: -errno.EOPNOTSUPP)
    with pytest.raises(OSError, match=r"IOMMU_HWPT_ALLOC: .*device 3, IOAS 7") as refused:
        iommufd.hwpt_alloc(3, 7, dirty_tracking=True)
    assert "leave out dirty_tracking" in refused.value.__notes__[0]
    with pytest.raises(OSError, match="IOMMU_HWPT_ALLOC") as refused:
        iommufd.hwpt_alloc(3, 7)
    assert not hasattr(refused.value, "__notes__")


@pytest.mark.parametrize(("pages", "words", "size"), [(1, 1, 1), (8, 1, 1), (9, 1, 2), (64, 1, 8), (65, 2, 9)])
def test_the_bitmap_has_a_bit_for_each_page(
    iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch, pages: int, words: int, size: int
) -> None:
    """The kernel gets whole words of 64 bits."""
    calls: list[tuple[int, ...]] = []

    def get(fd: int, hwpt: int, iova: int, length: int, page_size: int, out: Any) -> int:
        calls.append((hwpt, iova, length, page_size, len(out)))
        last = pages - 1
        out[last // 64] |= 1 << last % 64
        return 0

    use(
        monkeypatch,
        iommufd_hwpt_get_dirty_bitmap=get,
        iommufd_hwpt_set_dirty_tracking=lambda *arguments: calls.append(arguments) or 0,
    )
    iommufd.hwpt_set_dirty_tracking(9, True)
    found = iommufd.hwpt_get_dirty_bitmap(9, Range(GIB, pages * MIB), MIB)
    iommufd.hwpt_set_dirty_tracking(9, False)
    assert calls == [(1000, 9, 1), (9, GIB, pages * MIB, MIB, words), (1000, 9, 0)]
    assert (len(found), int.from_bytes(found, "little")) == (size, 1 << pages - 1)


def test_objects_have_numbers(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    def alloc(fd: int, out: Any) -> int:
        out[0] = 9
        return 0

    use(monkeypatch, iommufd_ioas_alloc=alloc, iommufd_destroy=lambda fd, number: -errno.EBUSY)
    assert iommufd.ioas_alloc() == 9
    with pytest.raises(OSError, match=r"IOMMU_DESTROY: .*object 9") as refused:
        iommufd.destroy(9)
    assert refused.value.errno == errno.EBUSY


def test_one_that_is_used_already_is_refused(iommufd: Iommufd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object has the lowest free ID, from 1 on; what was made to see that is destroyed."""
    for taken, used in ((set(), False), ({1}, True), ({2, 3}, True)):
        numbers = set(taken)

        def alloc(fd: int, out: Any, numbers: set[int] = numbers) -> int:
            out[0] = next(number for number in range(1, 9) if number not in numbers)
            numbers.add(out[0])
            return 0

        def destroy(fd: int, number: int, numbers: set[int] = numbers) -> int:
            numbers.remove(number)
            return 0

        use(monkeypatch, iommufd_ioas_alloc=alloc, iommufd_destroy=destroy)
        if used:
            with pytest.raises(BadDescriptor, match="has devices or mappings"):
                iommufd.check_unused()
        else:
            iommufd.check_unused()
        assert numbers == taken
