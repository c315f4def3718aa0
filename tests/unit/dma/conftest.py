"""Domains over either back end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.dma_stage import MEMBERS, Stage
from support.fake_ioas import FakeIoas
from support.fake_vfio import FakeVfio

import kvmpass.dma.iommufd
import kvmpass.dma.type1


@pytest.fixture
def type1(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """Over a made-up VFIO."""
    kernel = FakeVfio(MEMBERS)
    monkeypatch.setattr(kvmpass.dma.type1, "Container", kernel.container)
    monkeypatch.setattr(kvmpass.dma.type1, "Group", kernel.group)
    stage = Stage(kernel)
    yield stage
    stage.close()


@pytest.fixture
def ioas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """Over a made-up iommufd."""
    kernel = FakeIoas(MEMBERS)
    monkeypatch.setattr(kvmpass.dma.iommufd, "Iommufd", kernel.iommufd)
    monkeypatch.setattr(kvmpass.dma.iommufd, "Cdev", kernel.cdev)
    stage = Stage(kernel)
    yield stage
    stage.close()


@pytest.fixture(params=["type1", "ioas"])
def stage(request: pytest.FixtureRequest) -> Stage:
    """A domain knows no back end: what holds over the one holds over the other."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Stage)
    return found
