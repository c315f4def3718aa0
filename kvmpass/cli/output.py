"""The options ``--json``, ``-v`` and ``-q`` of the commands for the host, and their output.

Standard output has the answer: text, or with ``--json`` one document and nothing else. Standard error has everything
else. Colour is used on a terminal only, and not if ``NO_COLOR`` is set (no-color.org).

``kvmpass --help`` loads this module: what only an answer needs is imported where it is used.
"""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

SCHEMA = 2
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Output:
    """The output of one command. Made by :func:`host_command`."""

    def __init__(self, command: str, *, as_json: bool, verbose: bool, quiet: bool) -> None:
        self.command = command
        self.as_json = as_json
        self.verbose = verbose
        self.quiet = quiet

    def document(self, **body: Any) -> None:
        """Print the answer, if ``--json`` is set. Addresses and bit masks are hex strings, absent values null."""
        if self.as_json:
            _answer(document_text(self.command, **body))

    def record(self, **body: Any) -> None:
        """Print one line of an answer that has no end (JSON Lines), if ``--json`` is set."""
        if self.as_json:
            _answer(document_text(self.command, indent=None, **body))

    def text(self, line: str = "") -> None:
        """Print one line of the answer, unless ``--json`` is set. May have ``click.style``."""
        if not self.as_json:
            _answer(line)

    def note(self, line: str) -> None:
        """Print progress and remarks on standard error, unless ``--quiet`` is set."""
        if not self.quiet:
            click.echo(f"kvmpass: {line}", err=True)


def _answer(text: str) -> None:
    try:
        click.echo(text)
    except OSError as error:
        error.filename = "standard output"  # a failed write names nothing
        raise


def together(*decorators: Decorator) -> Decorator:
    """Return a decorator that stands for ``decorators``, the first at the top."""
    return lambda function: functools.reduce(lambda made, decorate: decorate(made), reversed(decorators), function)


def host_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the shared options; its function gets an :class:`Output` first."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
    @click.option("-v", "--verbose", is_flag=True, help="Print more.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors on standard error.")
    @functools.wraps(function)
    def command(*arguments: Any, as_json: bool, verbose: bool, quiet: bool, **options: Any) -> Any:
        name = click.get_current_context().command.name or ""
        if verbose and not quiet:
            import logging

            logging.basicConfig(level=logging.INFO, format="kvmpass: %(message)s")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # the locale may lack characters of names or of the tree
        output = Output(name, as_json=as_json, verbose=verbose, quiet=quiet)
        return function(output, *arguments, **options)

    return command


def colour() -> bool | None:
    """Return the colour argument for click: never with ``NO_COLOR``, else click asks the terminal."""
    return False if os.environ.get("NO_COLOR") else None


def document_text(command: str, indent: int | None = 2, **body: Any) -> str:
    """Return a JSON document with its schema, its command and ``body``; addresses are text, dataclasses objects."""
    import json

    return json.dumps({"schema": SCHEMA, "command": command, **body}, indent=indent, default=_plain)


def _plain(value: Any) -> object:
    from dataclasses import fields

    from kvmpass.host import Bdf  # loaded already if there is one

    if isinstance(value, Bdf):
        return str(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}


def error_fields(error: BaseException) -> dict[str, Any]:
    """Return the fields of an exception: its type, cause and remedies."""
    return {"type": type(error).__name__, "cause": error_text(error), "remedies": remedies(error)}


def error_text(error: BaseException) -> str:
    """Return the cause of an exception. What is not printable is a space: a guest may have chosen the text."""
    return _printable(_cause(error))


def remedies(error: BaseException) -> list[str]:
    """Return the notes of an exception, as printable as its cause: one may quote what a guest has chosen."""
    return [_printable(note) for note in getattr(error, "__notes__", ())]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _cause(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by SIGINT"
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return f"interrupted by {signal.Signals(error.code - 128).name}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``, and wait for a reader that takes it, even if ``fd`` does not block. Raises ``OSError``.

    Standard output may not: its description belongs to others as well, and one of them has set ``O_NONBLOCK``.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            import select

            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
