"""Standard streams that the caller has closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "list",
    "list --json",
    "doctor",
    "show ffff:ff:1f.7",
    "plan ffff:ff:1f.7",
    "assign ffff:ff:1f.7 -- true",
    "restore --dry-run",
    "--help",
    "lab status",
    "no-such-command",
)


def run(words: str, closed: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KVMPASS_STATE_DIR": str(directory), "KVMPASS_CACHE": str(directory)}
    line = f"exec {sys.executable} -m kvmpass {words} {closed}"
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.parametrize("words", COMMANDS)
def test_a_closed_stream_changes_nothing_else(words: str, tmp_path: Path) -> None:
    """No traceback; status and output on the other streams are the same."""
    usual = run(words, "", tmp_path)
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        result = run(words, closed, tmp_path)
        assert result.returncode == usual.returncode, (closed, result)
        assert "Traceback" not in result.stderr
        if "2>&-" not in closed:
            assert result.stderr == usual.stderr
        if closed in ("<&-", "2>&-") and words not in ("lab status", "doctor"):  # these measure something
            assert result.stdout == usual.stdout


@pytest.mark.parametrize("words", ["show ffff:ff:1f.7", "assign ffff:ff:1f.7 -- true", "no-such-command"])
def test_an_error_that_cannot_be_printed_has_its_exit_status(words: str, tmp_path: Path) -> None:
    assert run(words, "2>/dev/full", tmp_path).returncode == run(words, "", tmp_path).returncode


def test_the_next_file_does_not_become_the_output(tmp_path: Path) -> None:
    """A file that kvmpass writes must not become its standard output."""
    status = tmp_path / "status.json"
    result = run(f"assign ffff:ff:1f.7 --status-file {status} -- true", "<&- >&- 2>&-", tmp_path)
    assert result.returncode == 125
    assert status.read_text().startswith("{") and status.read_text().endswith("}\n")
