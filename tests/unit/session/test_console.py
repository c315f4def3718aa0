"""The log of a guest's console."""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvmpass.session import console as module
from kvmpass.session.console import Console
from kvmpass.session.directory import CONSOLE, OLDER_CONSOLE


def log(directory: Path) -> bytes:
    """Return what ``kvmpass logs`` prints."""
    return b"".join((directory / name).read_bytes() for name in (OLDER_CONSOLE, CONSOLE))


@pytest.mark.parametrize("call", ["open", "replace", "second replace"])
@pytest.mark.parametrize("size", [5, 50])
def test_a_log_that_cannot_be_rotated_goes_on(
    call: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a free descriptor, or with a full disk. What comes then is missing, and nothing else is."""
    monkeypatch.setattr(module, "MAX_LOG", 1000)
    seen: list[bytes] = []
    with closing(Console(tmp_path, seen.append)) as console:
        console(b"x" * 990)
        usual = getattr(Path, call.split()[-1])

        def fails(path: Path, *arguments: Any, **options: Any) -> Any:
            if call == "second replace" and path.name == CONSOLE:
                return usual(path, *arguments, **options)
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(Path, call.split()[-1], fails)
            console(b"y" * 20)
            console(b"y" * 20)
        console(b"z" * size)
        console(b"w" * 50)
        assert log(tmp_path) == b"x" * 990 + b"z" * size + b"w" * 50
        console(b"v" * 950)
        assert log(tmp_path)[-950:] == b"v" * 950
    assert b"".join(seen) == b"x" * 990 + b"y" * 40 + b"z" * size + b"w" * 50 + b"v" * 950
    assert {path.name for path in tmp_path.iterdir()} == {CONSOLE, OLDER_CONSOLE}
