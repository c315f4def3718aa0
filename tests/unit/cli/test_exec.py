"""``kvmpass exec``: what is refused before a guest is asked, and signals at that time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import click
import pytest

from kvmpass.cli import exec as module
from kvmpass.cli.main import kvmpass


@pytest.mark.parametrize("variable", ["", "=value", "1A=x", "A-B", "A B=x"])
def test_the_name_of_a_variable(variable: str) -> None:
    command = kvmpass.get_command(click.Context(kvmpass), "exec")
    assert command is not None
    with pytest.raises(click.UsageError, match="not a NAME, or NAME=VALUE"):
        command.main(["-e", variable, "no-guest"], obj=["true"], standalone_mode=False)


def test_a_signal_that_comes_with_the_request_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """COMMAND may run before ``request`` has returned."""
    passed: list[int] = []

    class Client:
        @classmethod
        @contextlib.contextmanager
        def connect(cls, guest: str) -> Iterator[Client]:
            yield cls()

        def request(self, do: str, descriptors: list[int], **arguments: Any) -> None:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.raise_signal(number)  # to this thread

        def notify(self, **message: int) -> None:
            passed.append(message["signal"])

        def answer(self, timeout: float | None) -> dict[str, int]:
            return {"status": 7}

    monkeypatch.setattr(module, "Client", Client)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    command = kvmpass.get_command(click.Context(kvmpass), "exec")
    assert command is not None
    assert command.main(["guest"], obj=["true"], standalone_mode=False) == 7
    assert {*passed} == {signal.SIGUSR1, signal.SIGTERM}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
