"""Teardown, written in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def run_all(steps: Iterable[Callable[[], object]], failure: BaseException | None = None) -> None:
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
