"""Arguments that name devices: exact addresses for commands that change something, filters for others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmpass import host
from kvmpass.cli.output import together
from kvmpass.errors import BadAddress, LayoutError, NoSuchDevice
from kvmpass.host.backend import AUTO, BACKENDS
from kvmpass.layout import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

if TYPE_CHECKING:  # generic since click 8.4 only
    _OfBdf = click.ParamType[host.Bdf]
    _OfSize = click.ParamType[int]
else:
    _OfBdf = _OfSize = click.ParamType


class WrongDevice(BadAddress):
    """An argument that is not an exact address: a usage error, printed like kvmpass's other errors."""

    exit_code = 2


class BdfType(_OfBdf):
    """The exact address of one function, as a :class:`kvmpass.host.Bdf`.

    If :func:`kvmpass.host.select` matches other text, the error names the addresses that match. Whether there is
    such a device is not checked here.
    """

    name = "BDF"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> host.Bdf:
        """Parse an address. Raises :class:`WrongDevice`."""
        if isinstance(value, host.Bdf):
            return value
        try:
            return host.Bdf.parse(value)
        except BadAddress as error:
            raise WrongDevice(str(error), _matching(value, ctx) or error.__notes__[0]) from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the items that complete ``incomplete``."""
        given = ctx.params.get(param.name or "")
        named = {str(bdf) for bdf in given} if isinstance(given, tuple) else set[str]()
        return addresses(incomplete, lambda device: str(device.bdf) not in named)


class SizeType(_OfSize):
    """A size in bytes, from a number with K, M, G or T."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size. Raises ``click.BadParameter``."""
        try:
            return parse_size(value)
        except LayoutError as error:
            self.fail(str(error), param, ctx)


BDF = BdfType()
SIZE = SizeType()


def _matching(text: str, ctx: click.Context | None) -> str | None:
    """Return a hint with the addresses that ``text`` matches, on the host that the command reads (``--sysfs``)."""
    from kvmpass.host.record import open_recorded  # imports the reader of archives: only for a wrong address
    from kvmpass.host.view.filters import select

    place = ctx.params.get("place") if ctx is not None else None
    try:
        with open_recorded(place) if isinstance(place, Path) else nullcontext(host.Sysfs()) as sysfs:
            devices = select(sysfs, [text])
    except NoSuchDevice:
        return None
    names = " ".join(str(device.bdf) for device in devices[:4]) + (" …" if len(devices) > 4 else "")
    return f"name an exact address; {text} matches: {names}"


backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=AUTO,
    show_default=True,
    help="The kernel's interface to the IOMMU; auto: iommufd where kernel and permissions allow, else type1.",
)


def _backing(ctx: click.Context, param: click.Parameter, pages: str | None) -> str:
    """Return the backing for ``--hugepages``."""
    return {None: "anonymous", "auto": "auto"}.get(pages, f"hugetlb-{pages}")


hugepages_option = click.option(
    "--hugepages",
    "backing",
    type=click.Choice(["auto", "2M", "1G"]),
    callback=_backing,
    help="Take guest memory from the host's pool; auto: from that of the largest pages that has enough, if any.",
)
"""Its value is that of a ``kvmpass.memory.Backing``, or ``auto``."""


p2p_option = click.option(
    "--p2p", is_flag=True, help="Let each device's DMA reach the BARs of the other devices (peer-to-peer)."
)


files_option = together(
    click.option(
        "--root",
        type=click.Path(),
        default="minimal",
        show_default=True,
        show_envvar=True,
        envvar="KVMPASS_GUEST_ROOT",
        metavar="minimal|host|DIR",
        help="The guest's root: busybox, made here; this host's files, read-only; or those of a directory. What the "
        "guest writes there stays in its memory.",
    ),
    click.option(
        "--share",
        "shares",
        multiple=True,
        type=click.Path(),
        metavar="SRC[:DST][,rw]",
        help="Let the guest read a directory of this host, at DST, by default the same path; with rw also write to "
        "it.  [repeatable]",
    ),
)
"""Files of this host in the guest."""


def addresses(incomplete: str, wanted: Callable[[host.PciDevice], bool] | None = None) -> list[CompletionItem]:
    """Return the host's addresses that begin with ``incomplete``, with or without the domain, and their names."""
    from click.shell_completion import CompletionItem

    from kvmpass.host.view.classes import class_name

    sysfs = host.Sysfs()
    names = host.Names(sysfs)
    items = []
    for device in sysfs.devices():
        full = str(device.bdf)
        text = full if full.startswith(incomplete) else full.partition(":")[2]
        if text.startswith(incomplete) and (wanted is None or wanted(device)):
            items.append(CompletionItem(text, help=f"{class_name(device.class_code)}: {names.short(device)}"))
    return items


def complete_filter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the addresses and drivers that complete a filter."""
    from click.shell_completion import CompletionItem

    items = addresses(incomplete)
    if incomplete:  # else all devices are offered already
        used = sorted({device.driver for device in host.Sysfs().devices() if device.driver})
        items += [CompletionItem(name, help="driver") for name in used if name.startswith(incomplete)]
    return items
