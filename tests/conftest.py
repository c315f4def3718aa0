"""What all tests share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from kvmpass._cache import cache_root

# If it is ignored, no child's exit status is reported; no test needs that.
signal.signal(signal.SIGCHLD, signal.SIG_DFL)

with suppress(RuntimeError):  # no home
    os.environ.setdefault("KVMPASS_LAB_CACHE", str(cache_root()))  # an emulated host has a cache of its own

SCHEMAS = Path(__file__).parents[1] / "docs/schemas"


@pytest.fixture(scope="session")
def valid() -> Callable[[str, str | bytes], Any]:
    """``valid("list", text)`` reads a JSON document and holds it against docs/schemas/list.json."""
    files = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    registry = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in files.items())

    def read(schema: str, text: str | bytes) -> Any:
        document = json.loads(text)
        jsonschema.Draft202012Validator(files[f"{schema}.json"], registry=registry).validate(document)
        return document

    return read


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """For tests that send signals: what ends a program does so here and in what is started, whatever was inherited.

    ``nohup`` and a shell's ``&`` start programs with some of them ignored.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, *before])
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
