"""One answer on standard output, everything else on standard error; with --json errors are documents too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmpass.cli.main import fail
from kvmpass.errors import GuestError

Valid = Callable[[str, str | bytes], Any]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvmpass", *arguments],
            env={"KVMPASS_STATE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_a_document_and_nothing_else(run: Callable[..., subprocess.CompletedProcess[str]], valid: Valid) -> None:
    done = run("restore", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert valid("restore", done.stdout)["devices"] == []
    assert run("restore").stdout == "nothing to restore\n"


def test_wrong_usage_is_a_document_too(run: Callable[..., subprocess.CompletedProcess[str]], valid: Valid) -> None:
    done = run("restore", "--json", "surplus")
    assert (done.returncode, done.stderr) == (2, "")
    error = valid("error", done.stdout)["error"]
    assert error["type"] == "UsageError"
    assert "surplus" in error["cause"]


def test_a_failure_is_a_document_too(
    run: Callable[..., subprocess.CompletedProcess[str]], valid: Valid, tmp_path: Path
) -> None:
    (tmp_path / "journal").write_text("a file")
    done = run("restore", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    error = valid("error", done.stdout)["error"]
    assert (error["type"], error["cause"]) == ("NotADirectoryError", f"{tmp_path}/journal: Not a directory")
    assert "KVMPASS_STATE_DIR" in error["remedies"][0]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_standard_output_is_named(more: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvmpass", "restore", *more],
            env={"KVMPASS_STATE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "kvmpass: standard output: No space left on device\n")


def test_what_a_guest_has_written_does_not_reach_the_terminal_in_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    error = GuestError("failed: \x1b]0;title\x07", "look at \x9b31m it")
    fail("exec", error, as_json=False)
    assert capsys.readouterr().err == "kvmpass: failed:  ]0;title \n  hint: look at  31m it\n"
    fail("exec", error, as_json=True)
    assert json.loads(capsys.readouterr().out)["error"]["remedies"] == ["look at  31m it"]
