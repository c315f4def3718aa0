"""The host's pools of huge pages, and what is available in them (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from kvmpass._dataclass import dataclass

POOLS = "sys/kernel/mm/hugepages"


def pool_name(page: int) -> str:
    """Return the directory in :data:`POOLS` of pages of ``page`` bytes."""
    return f"hugepages-{page >> 10}kB"


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

    @classmethod
    def read(cls, page: int, number: Callable[[str], int]) -> Self:
        """Read the pool; ``number`` returns the number in the file of a given name in the pool's directory."""
        names = ("free", "resv", "nr_overcommit", "surplus", "nr")
        return cls(page, *(number(f"{name}_hugepages") for name in names))

    @property
    def available(self) -> int:
        """Pages that a new mapping can have; negative if more are reserved for others than are free."""
        return self.free - self.resv + max(0, self.nr_overcommit - self.surplus)

    def nr_for(self, size: int) -> int:
        """Return what ``nr_hugepages`` must be for ``size`` bytes more than are mapped now."""
        return self.nr + -(-size // self.page) - self.available
