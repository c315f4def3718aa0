"""The option ``-e``: variables for a command in the guest."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from kvmpass._lazy import lazy_pattern

_NAME = lazy_pattern(r"[A-Za-z_][A-Za-z0-9_]*")


def variables(given: Sequence[str]) -> tuple[str, ...]:
    """Return ``NAME=VALUE`` of each that has a value, here or in the option. Raises ``click.UsageError``."""
    for text in given:
        if not _NAME.fullmatch(text.partition("=")[0]):
            raise click.UsageError(f"-e {text}: not a NAME, or NAME=VALUE, of letters, digits and underscores")
    return tuple(
        text if "=" in text else f"{text}={os.environ[text]}" for text in given if "=" in text or text in os.environ
    )
