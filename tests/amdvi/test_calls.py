"""The ioctls of an assignment, by strace: the short form of ``make bench``, which gates on counts."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.modes import FULL

from kvmpass import host

SCRIPTS = Path(__file__).parents[2] / "scripts/bench"
pytestmark = pytest.mark.amdvi(duration=6)

# Regions and interrupts of VFIO's PCI devices, and four eventfds: INTx, its unmasking, errors and requests.
MOST = {"VFIO_DEVICE_GET_REGION_INFO": 9, "VFIO_DEVICE_GET_IRQ_INFO": 5, "VFIO_DEVICE_SET_IRQS": 4}


@pytest.fixture
def ioctls(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("ioctls")
    for path in SCRIPTS.glob("*.py"):  # their names are short
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("backend", ["type1", pytest.param("iommufd", marks=FULL)])
def test_no_call_without_a_reason(ioctls: ModuleType, backend: str, nvme: str, nvme2: str) -> None:
    """Those of C, and those that the documents give a reason for; memory is mapped once, by the first device."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt-get install strace")
    with host.borrow(nvme, nvme2):
        first, second, added, removed = ioctls.of_kvmpass(backend, [nvme, nvme2]).values()
    least = ioctls.LEAST[backend]
    assert not ioctls.extra(least, first), "strace has missed a call that there must be"
    for calls in (first, second):
        more = ioctls.extra(calls, least)
        assert more.keys() <= ioctls.REASONS.keys()
        assert all(count <= MOST.get(name, 1) for name, count in more.items()), more
    assert sum(added.values()) <= 3 and sum(removed.values()) <= 2, (added, removed)
    maps = [sum(calls.get(name, 0) for name in ioctls.MAPS) for calls in (first, second, added, removed)]
    assert maps == [1, 0, 1, 0]
