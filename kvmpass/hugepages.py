"""The host's pools of huge pages: what they can give (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

POOLS = "sys/kernel/mm/hugepages"


def pool_name(page: int) -> str:
    """The directory in :data:`POOLS` of pages of ``page`` bytes."""
    return f"hugepages-{page >> 10}kB"


@dataclass(frozen=True, slots=True)
class HugePagePool:
    """A pool of pages of ``page`` bytes. The other fields count pages and are named after its files."""

    page: int
    free: int
    resv: int
    nr_overcommit: int
    surplus: int
    nr: int

    @classmethod
    def read(cls, page: int, number: Callable[[str], int]) -> Self:
        """``number`` reads the file of that name in the pool's directory."""
        names = ("free", "resv", "nr_overcommit", "surplus", "nr")
        return cls(page, *(number(f"{name}_hugepages") for name in names))

    @property
    def available(self) -> int:
        """Pages that a new mapping can have; negative where more are promised to others than are free."""
        return self.free - self.resv + max(0, self.nr_overcommit - self.surplus)

    def nr_for(self, size: int) -> int:
        """What ``nr_hugepages`` must be for ``size`` bytes more than are mapped now."""
        return self.nr + -(-size // self.page) - self.available
