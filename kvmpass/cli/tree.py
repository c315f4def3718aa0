"""``--sysfs``: commands that change nothing can read a recorded host instead of this one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
VARIABLE = "KVMPASS_SYSFS"


def tree_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option to a command; its function gets ``tree``, a :class:`host.Sysfs`, or None for this host."""

    @click.option(
        "--sysfs",
        "place",
        metavar="PLACE",
        type=click.Path(exists=True, path_type=Path),
        envvar=VARIABLE,
        is_eager=True,  # the error for a wrong BDF reads it
        help="Read a recorded host (an archive of doctor --record, or a directory) instead of this one.",
    )
    @functools.wraps(function)
    def command(*arguments: Any, place: Path | None, **options: Any) -> Any:
        if place is None:
            return function(*arguments, tree=None, **options)
        from kvmpass.host.record import BadRecord, open_recorded  # imports the reader of archives

        tree = click.get_current_context().with_resource(open_recorded(place))
        try:
            return function(*arguments, tree=tree, **options)
        except _DAMAGE as error:  # with a real kernel's files they would be bugs in kvmpass
            raise BadRecord(f"{place} is not a valid record of a host: {error!r}") from error

    return command
