"""The documentation: links lead somewhere, examples of JSON are valid, every command is named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ci_examples
from support.repository import ROOT

from kvmpass.cli.main import COMMANDS

DOCS = ROOT / "docs"
DRIVE_LAB = DOCS / "examples" / "drive-lab"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
SCHEMAS = sorted(path.stem for path in (DOCS / "schemas").glob("*.json") if path.stem != "common")
# Files that a page shows, and that tests in the emulated host run: test_examples.py, test_project.py.
SHOWN = [
    *(("cookbook.md", path) for path in sorted(ci_examples.CI.iterdir())),
    *(("testing.md", path) for kind in ("*.toml", "*.py") for path in sorted(DRIVE_LAB.rglob(kind))),
]
_FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_VALID = re.compile(r"^<!-- valid: (\S+) -->\n```json\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = _LINK.sub(lambda match: match[0][1 : match[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = sum(other == slug or other.startswith(f"{slug}-#") for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def links() -> list[tuple[Path, str]]:
    return [(page, target) for page in PAGES for target in _LINK.findall(prose(page)) if "://" not in target]


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda value: getattr(value, "name", value))
def test_relative_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    assert file.exists(), f"{page.name}: no file {name}"
    if anchor:
        assert anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_conflict_was_left(page: Path) -> None:
    assert not re.search(r"^(<{7}|\|{7}|={7}|>{7})( |$)", page.read_text(), re.MULTILINE), "a merge is unfinished"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_has_an_example_that_is_valid(schema: str, valid: Callable[[str, str | bytes], Any]) -> None:
    """One line of an answer without end is a document, too."""
    reference = (DOCS / "reference.md").read_text()
    assert f"(schemas/{schema}.json)" in reference
    assert f"(examples/{schema}.json)" in reference
    assert valid(schema, (DOCS / "examples" / f"{schema}.json").read_text())["schema"] == 2


def test_json_in_the_pages_is_valid(valid: Callable[[str, str | bytes], Any]) -> None:
    found = [example for page in PAGES for example in _VALID.findall(page.read_text())]
    assert found
    for schema, text in found:
        valid(schema, text)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_is_in_the_tables(command: str) -> None:
    """README's table says what it does, the reference how it ends."""
    for page in (ROOT / "README.md", DOCS / "reference.md"):
        first_cells = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| ")]
        assert any(re.search(rf"`{command}\b", cell) for cell in first_cells), f"{page.name} does not name {command}"


def test_every_variable_is_in_the_reference() -> None:
    """What the code reads from the environment, and what it sets there."""
    named = set(re.findall(r"`(_?KVMPASS_\w+)`", (DOCS / "reference.md").read_text()))
    for path in (ROOT / "kvmpass").rglob("*.py"):
        for variable in re.findall(r'"(_?KVMPASS_[A-Z_]*[A-Z])"', path.read_text()):
            assert variable in named, f"{path.name} knows {variable}"


def test_what_is_shown_in_c_stands_in_an_example() -> None:
    """The examples are built and run: ``tests/support/outside.py``."""
    sources = "".join(path.read_text() for path in (DOCS / "examples").rglob("*.c"))
    shown = [code for page in PAGES for code in re.findall(r"^```c\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert shown
    for code in shown:
        assert code in sources


def test_the_unit_is_valid(tmp_path: Path) -> None:
    """systemd-analyze wants the programs to exist, too."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("install systemd: systemd-analyze checks the unit")
    unit = (DOCS / "examples" / "kvmpass-guest.service").read_text()
    assert "/usr/local/bin/kvmpass" in unit
    path = tmp_path / "kvmpass-guest.service"
    path.write_text(unit.replace("/usr/local/bin/kvmpass", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_examples_compile() -> None:
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            compile(code, page.name, "exec")


@pytest.mark.parametrize(("page", "file"), SHOWN, ids=lambda value: getattr(value, "name", value))
def test_a_file_that_a_page_shows_is_shown_as_it_is(page: str, file: Path) -> None:
    assert f"\n{file.read_text()}```\n" in (DOCS / page).read_text()


def test_both_kinds_of_ci_run_the_same_commands() -> None:
    commands = ci_examples.github()
    assert commands == ci_examples.gitlab()
    for command in commands:
        subprocess.run(["bash", "-n", "-e", "-c", command], check=True)


def done_without_a_guest(commands: list[str], path: Path) -> list[list[str]]:
    """Run commands as GitLab's runner does, which ends a script at the first that fails; return those of sudo."""
    sudo = path / "sudo"
    sudo.write_text('#!/bin/sh\necho "$*" >>log\ncase $2 in cp | stop) exit 1 ;; esac\n')
    sudo.chmod(0o755)
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-eo", "pipefail", "-c", "\n".join(commands)], cwd=path, env=environment, check=True)
    return [line.split()[:2] for line in (path / "log").read_text().splitlines()]


def test_a_job_whose_guest_has_ended_rebinds_the_devices(tmp_path: Path) -> None:
    done = done_without_a_guest(ci_examples.gitlab_after(), tmp_path)
    assert done[:3] == [["kvmpass", "cp"], ["kvmpass", "stop"], ["kvmpass", "restore"]]


def test_a_job_without_one_before_begins(tmp_path: Path) -> None:
    """``stop`` fails without a guest; ``restore`` must follow all the same."""
    build, *commands = ci_examples.gitlab_script()
    assert build == "make -C driver"
    done = done_without_a_guest(commands[:2], tmp_path)
    assert done == [["kvmpass", "stop"], ["kvmpass", "restore"], ["kvmpass", "plan"]]
