"""Audits: missing and unexpected entries."""

from __future__ import annotations

import pytest

from kvmpass._dataclass import replace
from kvmpass.errors import AuditFailed
from kvmpass.layout import PAGE, Range
from kvmpass.memory.audit import Mirrored, compare

LOW, HIGH = (Mirrored(Range(start, PAGE), 0x7F00_0000_0000 + start, True) for start in (0, PAGE))


def test_equal_mirrors_are_no_difference() -> None:
    compare("these", {LOW, HIGH}, {HIGH, LOW})
    compare("these", set(), set())


def test_every_difference_is_named_by_address() -> None:
    with pytest.raises(AuditFailed) as failed:
        compare("these", {HIGH, LOW}, set())
    assert str(failed.value) == "these differ from guest memory: missing 0x0-0xfff rw; missing 0x1000-0x1fff rw"
    with pytest.raises(AuditFailed) as failed:
        compare("these", {LOW}, {HIGH, replace(LOW, writable=False), LOW})
    assert str(failed.value) == "these differ from guest memory: unexpected 0x0-0xfff ro; unexpected 0x1000-0x1fff rw"
    with pytest.raises(AuditFailed, match=r"missing .* unexpected"):
        compare("these", {LOW}, {replace(LOW, hva=PAGE)})
