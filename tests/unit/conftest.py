"""What several files of unit tests share.

Property tests give the same examples in every run, however slow the machine is at that moment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.fake_lab import lab as lab  # a fixture
from support.handover_stage import AtStep, Stage
from support.host_tree import Host
from support.one_answer import compare

from kvmpass.host import Bdf
from kvmpass.host.drivers import binding
from kvmpass.host.drivers.steps import Step

settings.register_profile("kvmpass", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvmpass")


@pytest.fixture(autouse=True)
def one_answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test made of its trees: all commands give one answer about each of their devices."""
    Host.made.clear()
    yield
    for host in Host.made:
        compare(host, tmp_path_factory.getbasetemp() / "no-state")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Stage]:
    """``made("bind")`` and ``made("unbind")``: a host just before that operation."""
    monkeypatch.setattr(binding, "NODE_TIMEOUT", 0.02)
    number = itertools.count()
    return lambda operation: Stage(tmp_path / f"host{next(number)}", operation)


@pytest.fixture
def one(made: Callable[[str], Stage]) -> Stage:
    return made("bind")


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> AtStep:
    """Do something at the first of those steps; returns a list that says whether it was reached."""

    def arrange(wanted: Step, action: Callable[[], object]) -> list[Step]:
        reached: list[Step] = []

        def hook(step: Step, bdf: Bdf) -> None:
            if step == wanted and not reached:
                reached.append(step)
                action()

        monkeypatch.setattr(binding, "_step", hook)
        return reached

    return arrange
