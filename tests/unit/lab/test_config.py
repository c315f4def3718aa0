"""The lab's configuration and result: invalid values, exit statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import LabConfig, LabResult
from kvmpass.lab.config import split_features


def test_features_split_at_commas_and_repeat() -> None:
    assert split_features(["svm,iommu", "intremap"]) == {"svm", "iommu", "intremap"}
    assert split_features([]) == frozenset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"without": frozenset({"gravity"})}, "gravity"),
        ({"accel": "hvf"}, "hvf"),
        ({"memory": "much"}, "much"),
        ({"memory": "0G"}, "0G"),
        ({"cpus": 0}, "CPU"),
        ({"timeout": 0.0}, "timeout"),
        ({"kernel": "next", "qemu": "system"}, "modern QEMU"),
        ({"writable": tuple(Path(f"/{n}") for n in range(9))}, "at most 8"),
        ({"without": frozenset({"iommu"}), "iommu_trace": Path("t")}, "trace"),
    ],
)
def test_invalid_values_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(LabError, match=words):
        LabConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "outcome", "expected"),
    [(0, "exited", 0), (137, "exited", 137), (None, "timeout", 124), (None, "panic", 126), (None, "silent", 126)],
)
def test_exit_statuses(status: int | None, outcome: str, expected: int) -> None:
    assert LabResult(status, outcome, "", 1.0).exit_status == expected  # type: ignore[arg-type]
