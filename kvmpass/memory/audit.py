"""Audit of what is derived from guest memory: memslots and DMA mappings must equal the list of regions."""

from __future__ import annotations

from kvmpass._dataclass import dataclass
from kvmpass.errors import AuditFailed
from kvmpass.layout import Range


@dataclass(frozen=True, slots=True, order=True)
class Mirrored:
    """A region as a memslot or DMA mapping."""

    range: Range
    """Guest-physical addresses, or I/O virtual addresses."""
    hva: int
    """The host virtual address."""
    writable: bool
    """Whether the guest, or a device, can write it."""

    def __str__(self) -> str:
        return f"{self.range} {'rw' if self.writable else 'ro'}"


def compare(what: str, wanted: set[Mirrored], found: set[Mirrored]) -> None:
    """Raise ``AuditFailed`` with every missing and every unexpected entry of ``what``, such as memslots."""
    if wanted != found:
        lines = [f"missing {entry}" for entry in sorted(wanted - found)]
        lines += [f"unexpected {entry}" for entry in sorted(found - wanted)]
        raise AuditFailed(f"{what} differ from guest memory: " + "; ".join(lines))
