"""Teardown, written in the order in which it happens, and the undoing of what failed half-way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


def run_all(*steps: Callable[[], object], failure: BaseException | None = None) -> None:
    """Run every step in order, even if one fails. Raises the first failure; the others become its notes.

    ``failure``: an exception that the caller is raising already. Failures become its notes, and nothing is raised.
    """
    first = failure
    for step in steps:
        try:
            step()
        except BaseException as error:
            if first is None:
                first = error
            else:
                first.add_note(f"and afterwards: {type(error).__name__}: {error}")
    if failure is None and first is not None:
        raise first


class undo_on_error:
    """Undo the block if it raises: the callbacks of the stack, last first, and then ``steps``, last first."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._undo = ExitStack()  # and not a base class: what pop_all() returns is closed without an error
        for step in steps:
            self._undo.callback(step)

    def __enter__(self) -> ExitStack:
        return self._undo

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if kind is not None:
            self._undo.__exit__(kind, error, trace)
