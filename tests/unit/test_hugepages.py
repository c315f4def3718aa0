"""Pools of huge pages; messages are tested with memory and doctor."""

from __future__ import annotations

import re
from collections.abc import Callable

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


def reader(files: dict[str, int], **others: int) -> Callable[[str], int]:
    """``others``: of nodes, by their names; a node that is not named has no such file."""

    def number(path: str) -> int:
        directory, _, file = path.rpartition("/")
        if match := re.search(r"/(node\d+)/", directory):
            if match[1] not in others:
                raise FileNotFoundError(path)
            return others[match[1]]
        assert directory == "sys/kernel/mm/hugepages/hugepages-2048kB"
        return files[file]

    return number


def test_a_pool_is_read_from_its_files() -> None:
    assert HugePagePool.read(2 * MIB, reader(FILES)) == HugePagePool(2 * MIB, 4, 1, 3, 2, 6)
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
    pool = HugePagePool.read(2 * MIB, reader(FILES | changes))
    assert (pool.available, pool.nr_for(8 * MIB + 1)) == (available, enough)


def test_pages_are_reserved_on_a_node_that_the_process_may_use() -> None:
    """``nr_hugepages`` of the whole pool spreads over all nodes. Nodes without such a pool have no pages of it."""
    files = FILES | {"resv_hugepages": 0, "nr_overcommit_hugepages": 0}
    pool = HugePagePool.read(2 * MIB, reader(files, node1=3, node2=2), ((1, 4), (2, 3)))
    assert (pool.free, pool.elsewhere, pool.available) == (4, 2, 2)
    assert pool.place == "sys/devices/system/node/node1/hugepages/hugepages-2048kB"
    assert pool.nr_for(8 * MIB) == 3 + 4 - 2
    everywhere = HugePagePool.read(2 * MIB, reader(files), ((1, 4), ()))
    assert (everywhere.place, everywhere.nr_for(10 * MIB)) == ("sys/kernel/mm/hugepages/hugepages-2048kB", 6 + 5 - 4)
    assert HugePagePool.read(2 * MIB, reader(files), ((4,), (3,))).nr_for(10 * MIB) == 5 - 4
