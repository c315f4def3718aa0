"""The argument GUEST of the commands for guests that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:  # generic since click 8.4 only
    _OfText = click.ParamType[str]
else:
    _OfText = click.ParamType


class GuestType(_OfText):
    """The name of a guest, or the address of one of its devices."""

    name = "GUEST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it as it is: whether there is such a guest is seen when it is asked for something."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names of this user's guests that begin with ``incomplete``."""
        return _running(incomplete)


class PlaceType(_OfText):
    """A path of this host, or ``GUEST:/PATH``."""

    name = "PLACE"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the guests that begin with ``incomplete``, and this host's files; a guest's own are not known."""
        name, colon, _ = incomplete.partition(":/")
        if colon and any(item.value == name for item in _running(name)):
            return []
        return [*_running(incomplete, ":/"), CompletionItem(incomplete, type="file")]


def _running(incomplete: str, suffix: str = "") -> list[CompletionItem]:
    from kvmpass.errors import KvmpassError
    from kvmpass.session.directory import guests

    try:
        found = guests()
    except (KvmpassError, OSError):
        return []
    return [
        CompletionItem(status.name + suffix, help=" ".join(status.devices))
        for status in found
        if (status.name + suffix).startswith(incomplete) and status.state != "dead"
    ]


GUEST = GuestType()
PLACE = PlaceType()
