"""Mirrors of guest memory held against the list of regions."""

from __future__ import annotations

from typing import NamedTuple

from kvmpass.errors import AuditFailed
from kvmpass.layout import Range


class Mirrored(NamedTuple):
    """A region as a mirror has it: its place, its host address in bytes, and whether it can be written there."""

    range: Range
    hva: int
    writable: bool

    def __str__(self) -> str:
        return f"{self.range} {'rw' if self.writable else 'ro'}"


def compare(what: str, wanted: set[Mirrored], found: set[Mirrored]) -> None:
    """Raise ``AuditFailed`` with everything that is missing or should not be there; ``what`` names the mirror."""
    if wanted != found:
        lines = [f"missing {one}" for one in sorted(wanted - found)]
        lines += [f"unexpected {one}" for one in sorted(found - wanted)]
        raise AuditFailed(f"{what} differ from guest memory: " + "; ".join(lines))
