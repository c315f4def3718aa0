"""Where the marked tests of this pytest run, and with which devices; one object for each configuration."""

from __future__ import annotations

import enum
import os
from dataclasses import field
from pathlib import Path

import pytest

from kvmpass._dataclass import dataclass
from kvmpass.testing.roles import discover, divide, from_environment

IN_LAB = "KVMPASS_LAB"
PLAN = "KVMPASS_TEST_PLAN"


class Mode(enum.Enum):
    """Where marked tests run."""

    OUTER = "in a lab that this pytest boots"
    LAB = "in this process, inside a lab"
    HARDWARE = "in this process, on real devices"


@dataclass(slots=True)
class State:
    """The mode of a configuration, and the devices of the host under test."""

    mode: Mode
    """Where marked tests run."""
    roles: dict[str, str] = field(default_factory=dict)
    """PCI address by role; empty in ``Mode.OUTER``."""
    profile: str = "base"
    """Name of the lab's profile."""
    iommu_trace: Path | None = None
    """File of the emulated IOMMU's trace, inside a lab that has one."""
    plan: Path | None = None
    """File of the plan, inside a lab that another pytest booted."""
    slowdown: float = 1.0
    """Factor for time limits, because hosts in parallel share the machine."""
    workers: int = 1
    """How many processes of pytest-xdist share the devices of this host."""
    shared: dict[str, str] = field(default_factory=dict)
    """PCI address by role of all workers together, if there are several."""

    @classmethod
    def of(cls, config: pytest.Config) -> State:
        """Return the state of a configuration."""
        return config.stash[_KEY]

    def store(self, config: pytest.Config) -> None:
        """Make this the state of a configuration."""
        config.stash[_KEY] = self


_KEY = pytest.StashKey[State]()


def detect(config: pytest.Config) -> State:
    """Return the state that the environment selects. Raises ``UsageError`` for an invalid ``KVMPASS_TEST_<ROLE>``."""
    if os.environ.get(IN_LAB):
        plan = os.environ.get(PLAN)
        state = State(Mode.LAB, discover(), plan=Path(plan) if plan else None)
    else:
        try:
            roles = from_environment(os.environ)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        state = State(Mode.HARDWARE, roles) if roles else State(Mode.OUTER)
    worker = getattr(config, "workerinput", None)  # of pytest-xdist
    if worker is not None and state.plan is None and state.mode is not Mode.OUTER:
        state.workers, state.shared = int(worker["workercount"]), state.roles
        state.roles = divide(state.shared, state.workers)[int(worker["workerid"].removeprefix("gw"))]
    return state


def missing_hardware(roles: dict[str, str], root: Path = Path("/")) -> str | None:
    """Return why this machine cannot run the tests in place, ``None`` if it can."""
    if not (root / "dev/kvm").exists():
        return "/dev/kvm is missing"
    if not any((root / "sys/class/iommu").glob("ivhd*")):
        return "no AMD IOMMU is active (/sys/class/iommu)"
    for role, bdf in roles.items():
        if not (root / "sys/bus/pci/devices" / bdf).exists():
            return f"the device {bdf} ({role}) does not exist"
    return None
