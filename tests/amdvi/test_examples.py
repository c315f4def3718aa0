"""The examples of the documentation that are run, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ci_examples
from support.repository import ROOT

from kvmpass import host

# A block that is run has the name of its profile before it, in a comment that a page does not show.
_EXAMPLE = re.compile(r"^<!-- run: (?P<profile>[\w-]+) -->\n```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# A recipe for the lab, with what it prints, or a change of the sources. In the lab already, commands lack the words
# that start one.
_RECIPE = re.compile(
    r"^<!-- (?P<kind>run|change): driver -->\n```sh\n(?P<command>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)
_START = "kvmpass lab run --writable . --device edu -- "
_TIME = re.compile(r"^\[ *\d+\.\d+\]", re.MULTILINE)


def examples(profile: str) -> list[pytest.param]:
    """Every example for a profile, with the place of its first line."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        for match in _EXAMPLE.finditer(text):
            if match["profile"] == profile:
                line = text.count("\n", 0, match.start("code"))
                found.append(pytest.param(path, line, match["code"], id=f"{path.stem}-{line + 1}"))
    return found


@pytest.mark.parametrize(("path", "line", "code"), examples("base"))
def test_example(path: Path, line: int, code: str) -> None:
    """It runs to its end, and what it asserts holds."""
    exec(compile("\n" * line + code, str(path), "exec"), {"__name__": "__main__"})


@pytest.mark.amdvi(profile="stock", duration=47)
def test_a_driver_authors_day(edu: str, faulty_module: Path, tmp_path: Path) -> None:
    """Its modules are built outside, by its own commands; see ``tests/support/outside.py``."""
    assert edu == "0000:00:04.0"
    built, page = faulty_module.parent, (ROOT / "docs" / "cookbook.md").read_text()
    assert (built / "test.sh").read_text().split("\n", 2)[2] in page
    shutil.copy(built / "test.sh", tmp_path)
    kinds = []
    for recipe in _RECIPE.finditer(page):
        kinds.append(recipe["kind"])
        if recipe["kind"] == "change":
            built = built / "changed"
            continue
        assert _START in recipe["command"]
        shutil.copy(built / "factorial.ko", tmp_path)
        done = subprocess.run(
            ["sh", "-ec", recipe["command"].replace(_START, "")],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=True,
        )
        assert _TIME.sub("[]", done.stdout) == _TIME.sub("[]", recipe["output"])
    assert kinds == ["run", "change", "run"]


@pytest.fixture
def job(edu: str, nvme: str, faulty_module: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job of CI in ``tmp_path``: without sudo, and with the driver built before.

    Its devices have the drivers from before, after it.
    """
    built, driver, programs = faulty_module.parent, tmp_path / "driver", tmp_path / "bin"
    driver.mkdir()
    programs.mkdir()
    shutil.copy(built / "changed/factorial.ko", driver)
    shutil.copy(built / "test.sh", driver)
    (driver / "Makefile").write_text("all: factorial.ko\n")
    (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (programs / "kvmpass").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmpass "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    before = [host.Sysfs().driver(host.Bdf.parse(bdf)) for bdf in (nvme, edu)]
    yield os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "DRIVE": nvme, "CARD": edu}
    after = [host.Sysfs().driver(host.Bdf.parse(bdf)) for bdf in (nvme, edu)]
    if after != before:  # the tests that follow need the devices
        subprocess.run([programs / "kvmpass", "stop", "ci"], timeout=60)
    assert after == before


@pytest.mark.amdvi(profile="stock", duration=60)
@pytest.mark.usefixtures("fio")
def test_a_job_of_ci(job: dict[str, str], tmp_path: Path) -> None:
    """Each step as GitHub's runner starts it, in a shell of its own."""
    for command in ci_examples.github():
        subprocess.run(["bash", "-e", "-c", command], cwd=tmp_path, env=job, timeout=200, check=True)
    assert (tmp_path / "results/guest/factorials").read_text().splitlines() == [
        "1! = 1",
        "5! = 120",
        "12! = 479001600",
    ]
    fio = json.loads((tmp_path / "results/guest/fio.json").read_text())
    assert [(done["error"], done["read"]["total_ios"]) for done in fio["jobs"]] == [(0, 256)]
    assert "/dev/nvme0n1" in (tmp_path / "results/nvme.json").read_text()
    assert (tmp_path / "results/console.log").exists()


@pytest.mark.amdvi(profile="stock", duration=57)
def test_a_job_of_ci_whose_test_fails(job: dict[str, str], tmp_path: Path) -> None:
    """Both scripts as GitLab's runner starts them, each in one shell, which ends at the first command that fails."""

    def run(commands: list[str]) -> int:
        words = ["bash", "-eo", "pipefail", "-c", "\n".join(commands)]
        return subprocess.run(words, cwd=tmp_path, env=job, timeout=200).returncode

    (tmp_path / "driver/test.sh").write_text("mkdir /tmp/results; echo 6 >/tmp/results/wrong; exit 3\n")
    assert run(ci_examples.gitlab_script()) == 3
    assert not (tmp_path / "results/nvme.json").exists()
    assert run(ci_examples.gitlab_after()) == 0
    assert (tmp_path / "results/guest/wrong").read_text() == "6\n"
    assert (tmp_path / "results/console.log").exists()
