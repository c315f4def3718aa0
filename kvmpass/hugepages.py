"""The host's pools of huge pages, and what is available in them (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from kvmpass._dataclass import dataclass
from kvmpass.numa import NODES

_Nodes = tuple[Sequence[int], Sequence[int]]
POOLS = "sys/kernel/mm/hugepages"


def pool_name(page: int) -> str:
    """Return the directory in :data:`POOLS` of pages of ``page`` bytes."""
    return f"hugepages-{page >> 10}kB"


def node_pool(node: int, page: int) -> str:
    """Return the directory of the part of a pool of pages of ``page`` bytes that is on a NUMA node."""
    return f"{NODES}/node{node}/hugepages/{pool_name(page)}"


@dataclass(frozen=True, slots=True)
class HugePagePool:
    """A pool of huge pages of one size. The fields but the first count pages and are named after its files."""

    page: int
    """Size of a page in bytes."""
    free: int
    """Pages that are not allocated."""
    resv: int
    """Pages that are reserved for mappings and not allocated."""
    nr_overcommit: int
    """Maximum number of surplus pages."""
    surplus: int
    """Pages above ``nr_hugepages``."""
    nr: int
    """Pages of the pool, ``nr_hugepages``."""
    elsewhere: int = 0
    """Free pages on NUMA nodes of which this process may have no memory (cpuset)."""
    node: int | None = None
    """The first node of which it may, if there are such nodes; None: it may have pages of all."""
    node_nr: int = 0
    """Pages of the pool on that node."""

    @classmethod
    def read(cls, page: int, number: Callable[[str], int | None], nodes: _Nodes = ((), ())) -> Self:
        """Read the pool; ``nodes``: those that this process may use, and the others.

        ``number`` returns the number in a file, or None, which counts as 0; ``OSError`` is raised if a file of the
        whole pool is not found. A node has no directory of a pool that it never had pages of.
        """
        names = ("free", "resv", "nr_overcommit", "surplus", "nr")
        base = f"{POOLS}/{pool_name(page)}"
        free, resv, nr_overcommit, surplus, nr = (number(f"{base}/{name}_hugepages") or 0 for name in names)

        def on(node: int, name: str) -> int:
            with suppress(OSError):
                return number(f"{node_pool(node, page)}/{name}_hugepages") or 0
            return 0

        ours, others = nodes
        elsewhere = sum(on(node, "free") for node in others)
        node = ours[0] if ours and others else None
        node_nr = on(node, "nr") if node is not None else 0
        return cls(page, free, resv, nr_overcommit, surplus, nr, elsewhere, node, node_nr)

    @property
    def available(self) -> int:
        """Pages that a new mapping can have; negative if more are reserved for others than are free.

        Pages are reserved on no particular node: those that fit on other nodes are taken to be there. The kernel
        refuses what it cannot reserve (``hugetlb_acct_memory``). It makes surplus pages only for what all nodes
        together lack (``gather_surplus_pages``): none while others have pages that are not reserved. (mm/hugetlb.c)
        """
        if self.resv < self.elsewhere:
            return self.free - self.elsewhere
        return self.free - self.resv + max(0, self.nr_overcommit - self.surplus)

    @property
    def place(self) -> str:
        """The directory whose ``nr_hugepages`` to raise: that of ``node``, or of the pool, which is on all nodes."""
        return f"{POOLS}/{pool_name(self.page)}" if self.node is None else node_pool(self.node, self.page)

    def nr_for(self, size: int) -> int:
        """Return what ``nr_hugepages`` in ``place`` must be for ``size`` bytes more than are mapped now."""
        return (self.nr if self.node is None else self.node_nr) + -(-size // self.page) - self.available
