"""The declarations in ``cffi_build/iommufd.h`` against the kernel's own headers, where these are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.repository import ROOT

from kvmpass.lab.cache import cache_root

# Of each structure ours, the kernel's, and its fields by both names.
IOMMUFD = {
    ("kvmpass_iommu_destroy", "iommu_destroy"): "size id",
    ("kvmpass_ioas_alloc", "iommu_ioas_alloc"): "size flags out_ioas_id",
    ("kvmpass_iova_range", "iommu_iova_range"): "start last",
    ("kvmpass_ioas_iova_ranges", "iommu_ioas_iova_ranges"): (
        "size ioas_id num_iovas reserved:__reserved allowed_iovas out_iova_alignment"
    ),
    ("kvmpass_ioas_map", "iommu_ioas_map"): "size flags ioas_id reserved:__reserved user_va length iova",
    ("kvmpass_ioas_unmap", "iommu_ioas_unmap"): "size ioas_id iova length",
    ("kvmpass_hwpt_set_dirty_tracking", "iommu_hwpt_set_dirty_tracking"): "size flags hwpt_id reserved:__reserved",
    ("kvmpass_hwpt_get_dirty_bitmap", "iommu_hwpt_get_dirty_bitmap"): (
        "size hwpt_id flags reserved:__reserved iova length page_size data"
    ),
}
# What later kernels have added fields to, at the end or in reserved bytes.
GROWN = {
    ("kvmpass_hwpt_alloc", "iommu_hwpt_alloc"): (
        "size flags dev_id pt_id out_hwpt_id reserved:__reserved data_type data_len data_uptr"
    ),
    ("kvmpass_hw_info", "iommu_hw_info"): "size flags dev_id data_len data_uptr out_data_type out_capabilities",
}
MAP_FILE = {("kvmpass_ioas_map_file", "iommu_ioas_map_file"): "size flags ioas_id fd start length iova"}
VFIO = {
    ("kvmpass_vfio_attach", "vfio_device_attach_iommufd_pt"): "argsz flags pt_id",
    ("kvmpass_vfio_detach", "vfio_device_detach_iommufd_pt"): "argsz flags",
    ("kvmpass_vfio_feature", "vfio_device_feature"): "argsz flags",
}
DMA_BUF = {
    ("kvmpass_vfio_dma_range", "vfio_region_dma_range"): "offset length",
    ("kvmpass_vfio_dma_buf", "vfio_device_feature_dma_buf"): "region_index open_flags flags nr_ranges",
}
BIND = "argsz flags iommufd out_devid"
NUMBERS = {
    "iommufd.h": (
        *(f"IOMMU_{name}" for name in ("DESTROY", "IOAS_ALLOC", "IOAS_IOVA_RANGES")),
        *("IOMMU_IOAS_MAP", "IOMMU_IOAS_UNMAP", "IOMMU_HWPT_ALLOC", "IOMMU_GET_HW_INFO"),
        *("IOMMU_HWPT_SET_DIRTY_TRACKING", "IOMMU_HWPT_GET_DIRTY_BITMAP", "IOMMU_HW_CAP_DIRTY_TRACKING"),
        *("IOMMU_HWPT_ALLOC_DIRTY_TRACKING", "IOMMU_HWPT_DIRTY_TRACKING_ENABLE"),
    ),
    "vfio.h": tuple(
        f"VFIO_DEVICE_{name}" for name in ("BIND_IOMMUFD", "ATTACH_IOMMUFD_PT", "DETACH_IOMMUFD_PT", "FEATURE")
    ),
}


def headers() -> list[Path]:
    """Directories with a ``linux/iommufd.h``: the system's, those of installed kernels, those in the lab's cache."""
    places = [Path("/usr/include"), *Path("/usr/src").glob("linux-headers-*/include/uapi")]
    places += cache_root().glob("kernels/headers-*/usr/src/linux-headers-*/include/uapi")
    return [place / "linux" for place in places if (place / "linux" / "iommufd.h").is_file()]


def same_structures(table: dict[tuple[str, str], str]) -> list[str]:
    lines = []
    for (ours, theirs), fields in table.items():
        lines.append(f'_Static_assert(sizeof(struct {ours}) == sizeof(struct {theirs}), "{theirs}");')
        lines += same_fields(ours, theirs, fields)
    return lines


def same_fields(ours: str, theirs: str, fields: str) -> list[str]:
    pairs = [(pair[0], pair[-1]) for pair in (field.split(":") for field in fields.split())]
    return [
        f"_Static_assert(offsetof(struct {ours}, {a}) == offsetof(struct {theirs}, {b})"
        f" && sizeof(((struct {ours} *)0)->{a}) == sizeof(((struct {theirs} *)0)->{b}),"
        f' "{theirs}.{b}");'
        for a, b in pairs
    ]


def program(directory: Path) -> str:
    """Does not compile if something differs."""
    text = (directory / "iommufd.h").read_text()
    bind = ("kvmpass_vfio_bind", "vfio_device_bind_iommufd")
    lines = ["#include <stddef.h>", f'#include "{directory}/iommufd.h"', f'#include "{directory}/vfio.h"']
    lines += [f'#include "{ROOT}/cffi_build/iommufd.h"', *same_structures(IOMMUFD), *same_structures(VFIO)]
    lines += [line for names, fields in GROWN.items() for line in same_fields(*names, fields)]
    if "struct iommu_ioas_map_file" in text:
        lines += same_structures(MAP_FILE)
        lines.append('_Static_assert(KVMPASS_IOMMU_IOAS_MAP_FILE == IOMMU_IOAS_MAP_FILE, "map file");')
    if "token_uuid_ptr" in (directory / "vfio.h").read_text():
        lines += same_structures({bind: f"{BIND} token_uuid_ptr"})
        lines.append('_Static_assert(KVMPASS_VFIO_BIND_TOKEN == VFIO_DEVICE_BIND_FLAG_TOKEN, "token");')
    else:
        lines += same_fields(*bind, BIND)
    if "VFIO_DEVICE_FEATURE_DMA_BUF" in (directory / "vfio.h").read_text():
        lines += same_structures(DMA_BUF)
        lines.append('_Static_assert(KVMPASS_VFIO_FEATURE_DMA_BUF == VFIO_DEVICE_FEATURE_DMA_BUF, "dma-buf");')
    lines += [
        f'_Static_assert(KVMPASS_VFIO_FEATURE_{flag} == VFIO_DEVICE_FEATURE_{flag}, "{flag}");'
        for flag in ("GET", "PROBE")
    ]
    numbers = [name for names in NUMBERS.values() for name in names]
    lines += [f'_Static_assert(KVMPASS_{name} == {name}, "{name}");' for name in numbers]
    lines += [
        f'_Static_assert(KVMPASS_IOAS_{flag} == IOMMU_IOAS_MAP_{flag}, "{flag}");'
        for flag in ("FIXED_IOVA", "WRITEABLE", "READABLE")
    ]
    return "\n".join(lines)


def compiles(source: str) -> tuple[bool, str]:
    words = ["gcc", "-fsyntax-only", "-D__user=", "-x", "c", "-"]
    done = subprocess.run(words, input=source, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode == 0, done.stderr


@pytest.fixture(params=headers() or [None], ids=str)
def kernels(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        pytest.skip("no linux/iommufd.h: `kvmpass lab headers`, or linux-libc-dev of Debian 13, makes it run")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: apt-get install gcc makes it run")
    assert isinstance(request.param, Path)
    return request.param


def test_layouts_and_numbers_are_the_kernels(kernels: Path) -> None:
    good, said = compiles(program(kernels))
    assert good, said


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("KVMPASS_IOMMU_DESTROY == IOMMU_DESTROY", "KVMPASS_IOMMU_IOAS_MAP == IOMMU_DESTROY"),
        ("kvmpass_ioas_map, user_va", "kvmpass_ioas_map, iova"),
    ],
)
def test_a_difference_does_not_compile(kernels: Path, right: str, wrong: str) -> None:
    source = program(kernels)
    assert right in source
    assert not compiles(source.replace(right, wrong))[0]
