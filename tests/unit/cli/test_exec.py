"""``kvmpass exec``: what is refused before a guest is asked."""

from __future__ import annotations

import click
import pytest

from kvmpass.cli.main import kvmpass


@pytest.mark.parametrize("variable", ["", "=value", "1A=x", "A-B", "A B=x"])
def test_the_name_of_a_variable(variable: str) -> None:
    command = kvmpass.get_command(click.Context(kvmpass), "exec")
    assert command is not None
    with pytest.raises(click.UsageError, match="not a NAME, or NAME=VALUE"):
        command.main(["-e", variable, "no-guest"], obj=["true"], standalone_mode=False)
