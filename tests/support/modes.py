"""The kernel's interfaces to the IOMMU, as a table: tests of DMA run through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

import kvmpass.dma.type1
from kvmpass.dma import BackendFactory, IommufdBackend, Type1
from kvmpass.iommufd.iommufd import NODE
from kvmpass.machine import Machine
from kvmpass.vfio import Container
from support.inside import SOAK
from support.witness import locked_bytes


@dataclass(frozen=True, slots=True)
class Mode:
    """One interface: what a machine takes, and how its pinned memory is counted."""

    name: str
    backend: BackendFactory
    locked: Callable[[], int]


MODES = {
    "type1": Mode("type1", Type1, locked_bytes),
    "iommufd": Mode("iommufd", IommufdBackend, partial(locked_bytes, "VmPin")),
    # The container's ioctls over /dev/iommu (drivers/iommu/iommufd/vfio_compat.c).
    "compat": Mode("compat", Type1, partial(locked_bytes, "VmPin")),
}
FULL = pytest.mark.amdvi(kernel="full")
# What costs a guest's boot runs in compatibility mode only in its long form: the calls are those of type 1.
NAMES = ["type1", pytest.param("iommufd", marks=FULL), *([pytest.param("compat", marks=FULL)] if SOAK else [])]
through_all_modes = pytest.mark.parametrize("mode", NAMES, indirect=True)
through_compat_too = pytest.mark.parametrize(
    "mode", ["type1", *(pytest.param(name, marks=FULL) for name in MODES if name != "type1")], indirect=True
)


@pytest.fixture(scope="session", autouse=True)
def type1_unless_said_otherwise() -> Iterator[None]:
    """What a machine takes that names no back end: tests of type 1's own rules run on kernels with both, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Machine.__init__.__kwdefaults__, "backend", "type1")
        yield


@pytest.fixture
def as_without_tests() -> Iterator[None]:
    """Machines that name no back end choose one as they do for anybody: iommufd where the kernel has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Machine.__init__.__kwdefaults__, "backend", "auto")
        yield


@contextmanager
def machines_use(mode: Mode) -> Iterator[None]:
    """Machines that name no back end use this mode's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Machine.__init__.__kwdefaults__, "backend", mode.backend)
        if mode.name == "compat":
            patch.setattr(kvmpass.dma.type1, "Container", partial(Container, NODE))
        yield


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Iterator[Mode]:
    """The mode that ``through_all_modes`` names."""
    with machines_use(MODES[request.param]):
        yield MODES[request.param]
