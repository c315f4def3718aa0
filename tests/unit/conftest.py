"""What several files of unit tests share.

Property tests give the same examples in every run, however slow the machine is at that moment.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.at_step import AtStep
from support.bind_stage import Stage
from support.fake_lab import lab as lab  # a fixture
from support.host_tree import Host
from support.one_answer import compare

from kvmpass._ratelimit import RateLimit, _LogLimit
from kvmpass.host.drivers import transaction

settings.register_profile("kvmpass", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvmpass")


@pytest.fixture(autouse=True)
def one_answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever a test made of its trees: all commands give one answer about each of their devices."""
    Host.made.clear()
    yield
    for host in Host.made:
        compare(host, tmp_path_factory.getbasetemp() / "no-state")


@pytest.fixture(autouse=True)
def no_limit_reached() -> None:
    """What tests before this one have made the package warn of counts no longer."""
    for logger in [*logging.root.manager.loggerDict.values()]:
        for limit in getattr(logger, "filters", ()):
            if isinstance(limit, _LogLimit):
                limit._limit = RateLimit()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: AtStep) -> Callable[[str], Stage]:
    """``made("bind")`` and ``made("unbind")``: a host just before that operation."""
    monkeypatch.setattr(transaction, "NODE_TIMEOUT", 0.02)
    number = itertools.count()
    return lambda operation: Stage(tmp_path / f"host{next(number)}", operation, at_step)


@pytest.fixture
def one(made: Callable[[str], Stage]) -> Stage:
    return made("bind")


@pytest.fixture
def at_step() -> AtStep:
    """What ``made`` hosts do at a step, once a test has arranged it."""
    return AtStep()
