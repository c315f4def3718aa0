"""``assign --timings``: the stages of a run as text, and in the status file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpass.timings import Stage, Timings

if TYPE_CHECKING:
    from kvmpass.machine import Machine
    from kvmpass.machine.vcpus import Accesses


class Measured:
    """The stages of a run, and the exits of its guest."""

    def __init__(self) -> None:
        self.timings = Timings()
        """The stages."""
        self._machine: Machine | None = None

    @property
    def machine(self) -> Machine | None:
        """The machine whose exits are counted. Set it before its guest starts."""
        return self._machine

    @machine.setter
    def machine(self, machine: Machine) -> None:
        self._machine = machine
        machine.count_accesses = True
        self.timings.count_exits = lambda: sum(machine.exit_reasons.values())

    @property
    def _accesses(self) -> dict[str, Accesses]:
        return self._machine.access_counts if self._machine else {}

    def document(self) -> dict[str, Any]:
        """Return the field of the status file."""
        return {
            "seconds": round(self.timings.seconds, 3),
            "stages": [
                {
                    "name": stage.name,
                    "seconds": round(stage.seconds, 3),
                    "cpu_seconds": round(stage.cpu_seconds, 3),
                    "exits": stage.exits,
                }
                for stage in self.timings.stages
            ],
            "accesses": [
                {"accessed": name, "reads": count.reads, "writes": count.writes}
                for name, count in self._accesses.items()
            ],
        }

    def lines(self) -> list[str]:
        """Return the same in lines."""
        stages = self.timings.stages
        total = Stage(
            "total",
            self.timings.seconds,
            sum(stage.cpu_seconds for stage in stages),
            sum(stage.exits for stage in stages),
        )
        lines = ["seconds      CPU  exits  stage"]
        lines += [f"{s.seconds:7.3f}  {s.cpu_seconds:7.3f}  {s.exits:5}  {s.name}" for s in (*stages, total)]
        if accesses := self._accesses:
            lines += ["  reads   writes  exits by what was accessed"]
            lines += [f"{count.reads:7}  {count.writes:7}  {name}" for name, count in accesses.items()]
        return lines
