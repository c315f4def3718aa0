"""``kvmpass cp``."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import click

from kvmpass._lazy import lazy_pattern
from kvmpass.cli.guests import PLACE
from kvmpass.errors import GuestError
from kvmpass.session.client import Client

_ANSWER_SECONDS = 2.0  # once the guest has sent all it does; a guest that goes on sending gives none
_IN_GUEST = lazy_pattern(r"([A-Za-z0-9][^/]*):(/.*)", re.DOTALL)


@click.command()
@click.argument("source", metavar="SRC", type=PLACE)
@click.argument("target", metavar="DST", type=PLACE)
def cp(source: str, target: str) -> None:
    """Copy a file or a directory into a guest, or out of it.

    \b
    kvmpass cp SRC GUEST:/DST
    kvmpass cp GUEST:/SRC DST

    If DST ends with a slash, SRC is copied into that directory under its own name. A path of this host that could be
    one of a guest is written with ./ before it. Out of a guest come regular files and directories only, within the
    limits of --copy-out.
    """
    inside, outside = _IN_GUEST.fullmatch(source), _IN_GUEST.fullmatch(target)
    if bool(inside) == bool(outside):
        raise click.UsageError("one of SRC and DST must be GUEST:/PATH")
    if outside:
        _copy_in(Path(source), outside[1], outside[2])
    elif inside:
        _copy_out(inside[1], inside[2], target)


def _copy_in(source: Path, guest: str, target: str) -> None:
    from kvmpass.session.files import pack, unpacking

    command, name = unpacking(source, target)
    with Client.connect(guest) as client:
        read, write = os.pipe()
        with os.fdopen(write, "wb", buffering=0) as file:
            _request(client, read, "exec", [read, 2, 2], args=command)
            with contextlib.suppress(BrokenPipeError):  # the answer says why
                pack(source, name, file)
        if client.answer()["status"] != 0:
            raise GuestError(f"{source} was not copied into the guest")


def _copy_out(guest: str, source: str, target: str) -> None:
    from kvmpass.session.files import unpack

    failure: GuestError | None = None
    with Client.connect(guest) as client:
        read, write = os.pipe()
        with os.fdopen(read, "rb") as file:
            _request(client, write, "pack", [write], path=source)
            try:
                unpack(source, target, file)
            except GuestError as error:
                failure = error
            with contextlib.suppress(TimeoutError):
                client.answer(_ANSWER_SECONDS if failure else None)  # says why, if nothing was sent for that reason
    if failure is not None:
        raise failure


def _request(client: Client, sent: int, do: str, streams: list[int], **arguments: object) -> None:
    try:
        client.request(do, streams, **arguments)
    finally:
        os.close(sent)
