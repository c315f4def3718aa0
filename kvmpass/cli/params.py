"""Arguments that name devices: exact addresses for what changes something, filters for what looks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from kvmpass import host
from kvmpass.errors import BadAddress, LayoutError, NoSuchDevice
from kvmpass.host import view
from kvmpass.layout import parse_size

if TYPE_CHECKING:  # generic since click 8.4 only
    _OfBdf = click.ParamType[host.Bdf]
    _OfText = click.ParamType[str]
    _OfSize = click.ParamType[int]
else:
    _OfBdf = _OfText = _OfSize = click.ParamType


class WrongDevice(click.BadParameter):
    """A usage error (exit status 2) with a cause and a hint, printed as kvmpass prints its own."""

    shows_hints = True

    def __init__(self, message: str, remedy: str, ctx: click.Context | None, param: click.Parameter | None) -> None:
        super().__init__(message, ctx=ctx, param=param)
        self.add_note(remedy)

    def format_message(self) -> str:
        return self.message

    def show(self, file: Any = None) -> None:
        click.echo(f"kvmpass: {self.message}", file=file, err=file is None)
        for note in self.__notes__:
            click.echo(f"  hint: {note}", file=file, err=file is None)


class BdfType(_OfBdf):
    """The exact address of one function, as a :class:`kvmpass.host.Bdf`: nothing that could mean another device.

    For a text that :func:`kvmpass.host.select` understands the error names the addresses that it stands for. Whether
    there is such a device is for the command to find out.
    """

    name = "BDF"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> host.Bdf:
        if isinstance(value, host.Bdf):
            return value
        try:
            return host.Bdf.parse(value)
        except BadAddress as error:
            raise WrongDevice(str(error), _meant(value, ctx) or error.__notes__[0], ctx, param) from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        given = ctx.params.get(param.name or "")
        taken = {str(one) for one in given} if isinstance(given, tuple) else set[str]()
        return addresses(incomplete, lambda device: str(device.bdf) not in taken)


class FilterType(_OfText):
    """What people type for devices; a text, for :func:`kvmpass.host.select`."""

    name = "FILTER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [*addresses(incomplete), *_drivers(incomplete)]


class SizeType(_OfSize):
    """Bytes, from a number with K, M, G or T."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except LayoutError as error:
            self.fail(str(error), param, ctx)


BDF = BdfType()
SIZE = SizeType()
FILTER = FilterType()


def _meant(text: str, ctx: click.Context | None) -> str | None:
    """The addresses that ``text`` stands for, on the host that the command looks at (``--sysfs``)."""
    from kvmpass.host.record import open_recorded  # with what reads archives

    place = ctx.params.get("place") if ctx is not None else None
    try:
        with open_recorded(place) if isinstance(place, Path) else nullcontext(host.Sysfs()) as sysfs:
            devices = view.select(sysfs, [text])
    except NoSuchDevice:
        return None
    names = " ".join(str(device.bdf) for device in devices[:4]) + (" …" if len(devices) > 4 else "")
    return f"this command takes exact addresses only; {text} would be: {names}"


def addresses(incomplete: str, wanted: Callable[[host.PciDevice], bool] | None = None) -> list[CompletionItem]:
    """The host's addresses that begin with ``incomplete``, with or without their domain, each with its name."""
    sysfs = host.Sysfs()
    names = host.Names(sysfs)
    items = []
    for device in sysfs.devices():
        full = str(device.bdf)
        text = full if full.startswith(incomplete) else full.partition(":")[2]
        if text.startswith(incomplete) and (wanted is None or wanted(device)):
            items.append(CompletionItem(text, help=f"{view.class_words(device.class_code)}: {names.short(device)}"))
    return items


def _drivers(incomplete: str) -> list[CompletionItem]:
    if not incomplete:  # the addresses are many enough
        return []
    used = sorted({device.driver for device in host.Sysfs().devices() if device.driver})
    return [CompletionItem(name, help="driver") for name in used if name.startswith(incomplete)]
