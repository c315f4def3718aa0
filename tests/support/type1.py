"""What of a machine's domain only the tests of VFIO's type 1 interface look at."""

from __future__ import annotations

from kvmpass.dma import Type1
from kvmpass.machine import Machine
from kvmpass.vfio import Container, Group
from support.recording import Recording


def _type1(machine: Machine) -> Type1:
    backend = machine.domain.backend
    found = backend.inner if isinstance(backend, Recording) else backend
    assert isinstance(found, Type1)
    return found


def container_of(machine: Machine) -> Container:
    """The container of a machine that has a device."""
    return _type1(machine).container


def groups_of(machine: Machine) -> dict[int, Group]:
    """The groups in it, by number."""
    return {number: joined.group for number, joined in _type1(machine)._groups.items()}
