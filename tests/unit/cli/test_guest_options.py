"""The options that say what a guest is made of."""

from __future__ import annotations

import os
import pty
from collections.abc import Iterator
from typing import Any

import click
import pytest

from kvmpass.cli.guest_options import command_options, guest_options, guest_spec, stay_options
from kvmpass.guest import GuestSpec
from kvmpass.session.session import BOOT_SECONDS


def spec(*arguments: str, command: tuple[str, ...] | None = ("true",)) -> GuestSpec:
    made: list[GuestSpec] = []

    @click.command()
    @guest_options
    @command_options
    def run(**options: Any) -> None:
        made.append(guest_spec(list(command) if command is not None else None, verbose=False, **options))

    run.main(list(arguments), standalone_mode=False)
    return made[0]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal on standard input."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "r+b", buffering=0) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield
    os.close(master)


def test_what_a_command_has_by_default() -> None:
    made = spec()
    assert (made.interactive, made.tty, made.environment, made.directory) == (False, False, (), "")


def test_the_help_has_the_limit_of_a_boot() -> None:
    """Its text is there without the module that boots guests."""

    @click.command()
    @stay_options
    def run(**options: Any) -> None:
        pass

    [option] = [option for option in run.params if option.name == "boot_timeout"]
    assert isinstance(option, click.Option)
    assert option.help is not None
    assert option.help.endswith(f"[default: {BOOT_SECONDS:g}]")


def test_variables_are_set_or_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSED", "a=b c")
    monkeypatch.delenv("MISSING", raising=False)
    made = spec("-e", "A=1", "--env", "PASSED", "-e", "MISSING", "-e", "EMPTY=", "-w", "/tmp")
    assert made.environment == ("A=1", "PASSED=a=b c", "EMPTY=")
    assert made.directory == "/tmp"


@pytest.mark.parametrize("name", ["", "=x", "1A", "A-B=c", "A B"])
def test_names_of_variables(name: str) -> None:
    with pytest.raises(click.UsageError, match="letters, digits"):
        spec("-e", name)


@pytest.mark.usefixtures("screen")
def test_a_terminal_on_a_terminal() -> None:
    assert spec("-it").tty
    with pytest.raises(click.UsageError, match="name one after --"):
        spec("-t", command=None)


def test_a_terminal_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nothing:  # noqa: PTH123
        monkeypatch.setattr("sys.stdin", nothing)
        with pytest.raises(click.UsageError, match="use -i"):
            spec("-t")


@pytest.mark.parametrize("words", [["-e", "A=b"], ["-w", "/tmp"], ["-i"]])
def test_what_is_for_a_command_needs_one(words: list[str]) -> None:
    with pytest.raises(click.UsageError, match="COMMAND"):
        spec(*words, command=None)
