"""Numbers of NUMA nodes, in the kernel's words."""

from __future__ import annotations

import pytest

from kvmpass import numa
from kvmpass.hugepages import HugePagePool
from kvmpass.numa import own_nodes, parse_nodes, split_nodes


@pytest.mark.parametrize(
    "text, nodes",
    [("0", {0}), ("0-2,5", {0, 1, 2, 5}), ("", set()), ("x,3-,-1", set()), ("3-1", set()), (" 1 , 2", {1, 2})],
)
def test_lists_of_nodes(text: str, nodes: set[int]) -> None:
    assert parse_nodes(text) == nodes


def test_a_list_never_grows_beyond_what_a_kernel_has() -> None:
    assert len(parse_nodes("0-99999999999")) == 1025


def test_the_nodes_that_a_process_may_use() -> None:
    names = ["node10", "node2", "possible", "nodes", "node0"]
    assert split_nodes(names, "", "0,10") == ([0, 10], [2])
    assert split_nodes(names, "", "0-1023") == ([0, 2, 10], [])
    for unknown in ("", "77"):
        assert split_nodes(names, "0,2,10", unknown) == ([0, 2, 10], [])
        assert split_nodes(names, unknown, "0") == ([0], [2, 10])


def test_nodes_without_memory_are_nobodys() -> None:
    """They are online, and never allowed."""
    names = ["node0", "node1", "node2"]
    assert split_nodes(names, "0,2\n", "0,2") == ([0, 2], [])
    assert split_nodes(names, "0,2", "0") == ([0], [2])


def test_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, others = own_nodes()
    assert not set(ours) & set(others)
    monkeypatch.setattr(numa, "NODES", "no/such/directory")
    assert own_nodes() == ([], [])


@pytest.mark.parametrize("resv, available", [(0, 3), (2, 3), (3, 2), (6, -1)])
def test_what_is_reserved_is_elsewhere_if_it_fits(resv: int, available: int) -> None:
    pool = HugePagePool(1 << 21, free=5, resv=resv, nr_overcommit=0, surplus=0, nr=5, elsewhere=2)
    assert pool.available == available


@pytest.mark.parametrize("resv, available", [(0, 2), (7, 2), (8, 10), (9, 9), (10, 8), (19, -1)])
def test_pages_above_the_pool_are_made_for_what_all_nodes_lack(resv: int, available: int) -> None:
    pool = HugePagePool(1 << 21, free=10, resv=resv, nr_overcommit=8, surplus=0, nr=10, elsewhere=8)
    assert pool.available == available
    for wanted in range(1, 20):  # gather_surplus_pages and hugetlb_acct_memory (mm/hugetlb.c)
        needed = max(0, resv + wanted - pool.free)
        accepted = needed <= pool.nr_overcommit and wanted <= pool.free - pool.elsewhere + needed
        assert accepted is (wanted <= available)
