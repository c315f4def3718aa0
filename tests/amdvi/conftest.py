"""Everything below needs AMD-V, AMD-Vi and VFIO: real hardware, or the lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.testing import Profile

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("amdvi") is None:
            item.add_marker(pytest.mark.amdvi)


def pytest_kvmpass_profiles() -> dict[str, Profile]:
    """One drive and nothing else, for a boot that one test needs."""
    return {"single": Profile(devices=("nvme,addr=04.0",))}
