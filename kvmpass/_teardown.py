"""Teardown, written in the order in which it happens, and the undoing of what failed half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


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


@contextmanager
def undo_on_error(*steps: Callable[[], object]) -> Iterator[ExitStack]:
    """Undo the block if it raises: the callbacks of the stack, last first, and then ``steps``, last first."""
    with ExitStack() as undo:
        for step in steps:
            undo.callback(step)
        yield undo
        undo.pop_all()
