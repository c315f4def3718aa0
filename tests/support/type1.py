"""What of a machine's domain only the tests of VFIO's type 1 interface look at."""

from __future__ import annotations

from kvmpass.dma import Type1
from kvmpass.machine import Machine
from kvmpass.vfio import Container, Group


def _type1(machine: Machine) -> Type1:
    assert isinstance(machine.domain.backend, Type1)
    return machine.domain.backend


def container_of(machine: Machine) -> Container:
    """The container of a machine that has a device."""
    return _type1(machine).container


def groups_of(machine: Machine) -> dict[int, Group]:
    """The groups in it, by number."""
    return {number: joined.group for number, joined in _type1(machine)._groups.items()}
