"""Something that happens at a step of a change of drivers: a failure, a signal, a kill, another hand."""

from __future__ import annotations

from collections.abc import Callable

from kvmpass.host import Bdf
from kvmpass.host.drivers.changes import Step


class AtStep:
    """``at_step(step, action)`` arranges it; ``at_step.hook`` is the ``on_step`` of ``bind``, ``borrow`` …."""

    def __init__(self) -> None:
        self._wanted: Step | None = None
        self._action: Callable[[], object] = lambda: None
        self._reached: list[Step] = []

    def __call__(self, wanted: Step, action: Callable[[], object]) -> list[Step]:
        """At the first of those steps, instead of what was arranged before; returns whether it was reached."""
        self._wanted, self._action, self._reached = wanted, action, []
        return self._reached

    def hook(self, step: Step, bdf: Bdf) -> None:
        if step == self._wanted and not self._reached:
            self._reached.append(step)
            self._action()
