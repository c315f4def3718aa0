"""Where the marked tests of this pytest run, and with which devices. One object for each configuration."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvmpass.testing.roles import discover, from_environment

IN_LAB = "KVMPASS_LAB"
PLAN = "KVMPASS_TEST_PLAN"


class Mode(enum.Enum):
    """Where marked tests run."""

    OUTER = "in a lab that this pytest boots"
    LAB = "here, and here is a lab"
    HARDWARE = "here, on real devices"


@dataclass(slots=True)
class State:
    """``roles`` maps a role to a PCI address; empty outside, where nobody may touch a device.

    ``slowdown`` stretches time limits: this host shares the machine with others.
    """

    mode: Mode
    roles: dict[str, str] = field(default_factory=dict)
    profile: str = "base"
    iommu_trace: Path | None = None
    plan: Path | None = None
    slowdown: float = 1.0

    @classmethod
    def of(cls, config: pytest.Config) -> State:
        return config.stash[_KEY]

    def keep(self, config: pytest.Config) -> None:
        config.stash[_KEY] = self


_KEY = pytest.StashKey[State]()


def detect() -> State:
    """Decide by the environment. Raises ``UsageError`` for a ``KVMPASS_TEST_<ROLE>`` that makes no sense."""
    if os.environ.get(IN_LAB):
        plan = os.environ.get(PLAN)
        return State(Mode.LAB, discover(), plan=Path(plan) if plan else None)
    try:
        roles = from_environment(os.environ)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    return State(Mode.HARDWARE, roles) if roles else State(Mode.OUTER)


def hardware_lacks(roles: dict[str, str], root: Path = Path("/")) -> str | None:
    """Why this machine cannot run the tests in place, ``None`` if it can."""
    if not (root / "dev/kvm").exists():
        return "/dev/kvm is missing"
    if not any((root / "sys/class/iommu").glob("ivhd*")):
        return "no AMD IOMMU is active (/sys/class/iommu)"
    for role, bdf in roles.items():
        if not (root / "sys/bus/pci/devices" / bdf).exists():
            return f"there is no device {bdf} ({role})"
    return None
