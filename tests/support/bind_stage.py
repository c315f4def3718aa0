"""A made-up host for binding: one operation on one of its devices, and what there is to see of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpass.host import bind, restore, unbind
from kvmpass.host.drivers.bind import Handover
from kvmpass.host.drivers.changes import Step
from support.at_step import AtStep
from support.host_tree import Host

NVME, EDU, NIC, FIRST, SECOND, BRIDGE = (
    "0000:01:00.0",
    "0000:00:04.0",
    "0000:02:00.0",
    "0000:00:10.0",
    "0000:00:10.1",
    "0000:00:11.0",
)
BINDING = [Step.RECORDED, Step.OVERRIDE, Step.UNBIND, Step.PROBE, Step.BOUND]
UNBINDING = [
    Step.RECORDED,
    Step.RETURN_PREPARE,
    Step.RETURN_UNBIND,
    Step.RETURN_PROBE,
    Step.RETURN_OVERRIDE,
    Step.RETURN_POWER,
    Step.RETURNED,
]


class Stage:
    """A host with a device on its driver, or bound already, and one operation on it."""

    def __init__(self, directory: Path, operation: str, at_step: AtStep) -> None:
        self.on_step = at_step.hook
        self.host = Host(directory / "host")
        self.state = directory / "state"
        host = self.host
        host.add(NVME, "nvme", 7, power__control="auto", d3cold_allowed="1")
        host.add(EDU, None, 5)
        host.add(NIC, "e1000e", 9, driver_override="e1000e")
        host.add(FIRST, "nvme", 11)
        host.add(SECOND, "nvme", 11)
        host.add(BRIDGE, "pcieport", 11, class_code=0x060400)
        self.operation = operation
        if operation == "unbind":
            self.bind(NVME)
        host.writes.clear()
        self.number = 0  # of the write that a test is about

    def bind(self, *bdfs: str, **options: bool) -> list[Handover]:
        return bind(bdfs, sysfs=self.host, state_dir=self.state, on_step=self.on_step, **options)

    def unbind(self, *bdfs: str, **options: bool) -> list[Handover]:
        return unbind(bdfs, sysfs=self.host, state_dir=self.state, on_step=self.on_step, **options)

    def run(self) -> list[Handover]:
        return self.bind(NVME) if self.operation == "bind" else self.unbind(NVME)

    def restore(self) -> list[tuple[str, str]]:
        return [(result.bdf, result.outcome) for result in restore(self.host, self.state, on_step=self.on_step)]

    def snapshot(self) -> dict[str, Any]:
        """Every attribute that could have changed, and what the state directory says."""
        found: dict[str, Any] = {}
        for bdf in (NVME, EDU, NIC, FIRST, SECOND, BRIDGE):
            base = ("sys/bus/pci/devices", bdf)
            names = ("power/control", "d3cold_allowed")
            found[bdf] = (*self.host.state(bdf), *(self.host.text(*base, name) for name in names))
        for path in sorted(self.state.glob("*/*")):
            found[str(path.relative_to(self.state))] = path.read_text()
        return found

    def refused(self, kind: type[Exception], match: str, *bdfs: str, of: str = "bind", **options: bool) -> list[str]:
        """Nothing changes, in a dry run neither; returns the hints."""
        operation = self.bind if of == "bind" else self.unbind
        before = self.snapshot()
        self.host.writes.clear()
        for dry_run in (True, False):
            with pytest.raises(kind, match=match) as caught:
                operation(*bdfs, dry_run=dry_run, **options)
        assert self.host.writes == []
        assert self.snapshot() == before
        return list(getattr(caught.value, "__notes__", []))

    def before_write(self, number: int, action: Callable[[], object]) -> None:
        """Do something just before the write of that number."""
        original, count = self.host.write, 0

        def write(path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
            nonlocal count
            count += 1
            if count == number:
                action()
            original(path, text, timeout, held)

        self.host.write = write  # type: ignore[method-assign]


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


EVERY_STEP = [("bind", step) for step in BINDING] + [("unbind", step) for step in UNBINDING]
