"""Module parameters on a kernel's command line, as modprobe finds them.

Sources: lib/cmdline.c (``next_arg``) of the kernel, libkmod-config.c (``kmod_config_parse_kcmdline``) of kmod.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kvmpass._lazy import lazy_pattern

_WORD = lazy_pattern(r'(?:[^\s"]|"[^"]*(?:"|$))+')
_PARAMETER = lazy_pattern(r'("?)([^\s".=]+)\.([^\s".=]+)(?:=(.*))?', re.DOTALL)


def words(command_line: str) -> list[str]:
    """Split a command line into words, quotes included: a space between double quotes does not separate."""
    return _WORD.findall(command_line) if '"' in command_line else command_line.split()


def module_parameters(command_line: Iterable[str]) -> dict[str, str]:
    """Return the parameters by module, named with ``_``, from words ``MODULE.NAME=VALUE``.

    ``MODULE.NAME`` without a value is a switch. Quotes are kept, and moved to the value if they enclose the word: the
    kernel removes them.
    """
    found: dict[str, list[str]] = {}
    for word in command_line:
        if match := _PARAMETER.fullmatch(word):
            quote, module, name, value = match.groups()
            text = name if value is None else f"{name}={quote}{value}"
            found.setdefault(module.replace("-", "_"), []).append(text)
    return {module: " ".join(texts) for module, texts in found.items()}
