"""``kvmpass restore`` prints what it has restored, whatever else fails."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kvmpass import host
from kvmpass.cli.main import kvmpass


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(bdf="0000:01:00.0", outcome="restored", detail="bound to nvme")
    monkeypatch.setattr(host, "restore", lambda **arguments: [entry])


def output() -> tuple[int, list[str]]:
    result = CliRunner().invoke(kvmpass, ["restore"], standalone_mode=False)
    assert result.exception is None
    return result.return_value, result.output.splitlines()


def test_without_a_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    for name in ("KVMPASS_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    reason = "kvmpass: killed guests were not looked for: XDG_RUNTIME_DIR is not set: guests are found there"
    status, lines = output()
    assert (status, sorted(lines)) == (0, ["0000:01:00.0: restored: bound to nvme", reason])


def test_with_one_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("KVMPASS_RUNTIME_DIR", str(tmp_path / "loop"))
    status, lines = output()
    assert (status, len(lines)) == (0, 2)
    assert "0000:01:00.0: restored: bound to nvme" in lines
