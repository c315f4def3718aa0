"""The seam below a domain: what it lets a back end do that is not type 1."""

from __future__ import annotations

import pytest
from support.dma_stage import DISK, NIC, SOUND, Stage
from support.fake_vfio import Refused

from kvmpass.errors import AuditFailed
from kvmpass.layout import GIB, PAGE
from kvmpass.vfio.device import DependentDevice


def test_a_back_end_may_open_the_device_before_memory_is_mapped(ioas: Stage) -> None:
    device = ioas.domain.attach(NIC, 1)
    assert ioas.kernel.log == ["get_device_fd", "file_add", "bind", "attach", "map", "map"]
    ioas.kernel.log.clear()
    other = ioas.domain.attach(DISK, 2)
    assert ioas.kernel.log == ["get_device_fd", "file_add", "bind", "attach"]
    ioas.kernel.log.clear()
    ioas.domain.detach(device)
    assert ioas.kernel.log == ["file_del", "device.close"]
    ioas.check()
    ioas.kernel.log.clear()
    ioas.domain.detach(other)
    assert ioas.kernel.log == ["file_del", "device.close", "unmap", "unmap", "unmap_all", "destroy"]


def test_a_region_that_comes_while_a_device_opens_is_mapped_once(ioas: Stage) -> None:
    """The back end holds no lock: the domain maps what is there when the translation begins."""
    real = ioas.kernel.open

    def slow(*arguments: object) -> object:
        ioas.memory.add_ram(4 * GIB, PAGE, "extra")
        return real(*arguments)

    ioas.kernel.open = slow
    ioas.domain.attach(NIC, 1)
    assert len(ioas.domain.ledger) == 3
    ioas.check()


def test_a_hot_reset_needs_no_groups(ioas: Stage) -> None:
    nic = ioas.domain.attach(NIC, 1)
    ioas.domain.attach(SOUND, 1)
    ioas.kernel.dependent = {NIC: [DependentDevice(NIC, None, 1), DependentDevice(SOUND, None, 2)]}
    ioas.domain.hot_reset(nic)
    assert nic.resets == [[]]  # type: ignore[attr-defined]


def test_the_back_end_gets_the_region(ioas: Stage) -> None:
    """Not addresses alone: one that maps files needs what is behind the region."""
    seen = []
    real = ioas.domain.backend.map

    def recorded(region: object) -> None:
        seen.append(region)
        real(region)  # type: ignore[arg-type]

    ioas.domain.backend.map = recorded  # type: ignore[method-assign]
    ioas.domain.attach(NIC, 1)
    assert seen == [ioas.ram, ioas.rom]


@pytest.mark.parametrize("several", [False, True])
def test_whatever_fails_at_the_end_the_domain_says_what_holds(ioas: Stage, several: bool) -> None:
    """Each call fails once, after its work."""
    if several:
        ioas.domain.attach(DISK, 2)
    device = ioas.domain.attach(NIC, 1)
    ioas.kernel.log.clear()
    ioas.domain.detach(device)
    calls = list(ioas.kernel.log)
    for number, name in enumerate(calls, start=1):
        device = ioas.domain.attach(NIC, 1)
        ioas.kernel.fail(number, after=True)
        with pytest.raises((Refused, AuditFailed)):
            ioas.domain.detach(device)
        ioas.kernel.log.clear()
        ioas.domain.detach(device)
        assert ioas.kernel.log == [], f"{name} fails: the device has left"
        if not several:
            assert ioas.domain.ledger == []
