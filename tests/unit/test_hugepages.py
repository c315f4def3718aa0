"""Pools of huge pages; messages are tested with memory and doctor."""

from __future__ import annotations

import pytest

from kvmpass.hugepages import HugePagePool, pool_name
from kvmpass.layout import GIB, MIB

FILES = {
    "free_hugepages": 4,
    "resv_hugepages": 1,
    "nr_overcommit_hugepages": 3,
    "surplus_hugepages": 2,
    "nr_hugepages": 6,
}


def test_a_pool_is_read_from_its_files() -> None:
    assert HugePagePool.read(2 * MIB, FILES.__getitem__) == HugePagePool(2 * MIB, 4, 1, 3, 2, 6)
    assert (pool_name(2 * MIB), pool_name(GIB)) == ("hugepages-2048kB", "hugepages-1048576kB")


@pytest.mark.parametrize(
    ("changes", "available", "enough"),
    [
        ({}, 4, 7),
        ({"resv_hugepages": 7}, -2, 13),  # reservations of other processes
        ({"surplus_hugepages": 5}, 3, 8),  # a surplus above the limit does not count
    ],
)
def test_available_pages(changes: dict[str, int], available: int, enough: int) -> None:
    pool = HugePagePool.read(2 * MIB, (FILES | changes).__getitem__)
    assert (pool.available, pool.nr_for(8 * MIB + 1)) == (available, enough)
