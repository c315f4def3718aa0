"""The host's pools of huge pages, and what is available in them (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from kvmpass._dataclass import dataclass
from kvmpass.numa import NODES

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

    @classmethod
    def read(cls, page: int, number: Callable[[str], int], elsewhere: int = 0) -> Self:
        """Read the pool; ``number`` returns the number in the file of a given name in the pool's directory."""
        names = ("free", "resv", "nr_overcommit", "surplus", "nr")
        free, resv, nr_overcommit, surplus, nr = (number(f"{name}_hugepages") for name in names)
        return cls(page, free, resv, nr_overcommit, surplus, nr, elsewhere)

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

    def nr_for(self, size: int) -> int:
        """Return what ``nr_hugepages`` must be for ``size`` bytes more than are mapped now."""
        return self.nr + -(-size // self.page) - self.available
