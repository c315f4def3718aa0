"""What the wheel brings beside the package: the documentation, as the source has it, and the manual page."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from support.repository import ROOT

from kvmpass.cli.main import COMMANDS, documentation

PAGES = "share/doc/kvmpass"
MANUAL = ROOT / "docs" / "kvmpass.1"


def data_files() -> dict[Path, str]:
    """The files by their place in the source, with the directory below the prefix that each goes to."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    return {
        path.relative_to(ROOT): target
        for target, patterns in settings.items()
        for pattern in patterns
        for path in ROOT.glob(pattern)
    }


def test_the_pages_lie_as_in_the_source() -> None:
    """So their links lead somewhere, and nothing is left out."""
    files = data_files()
    assert files.pop(MANUAL.relative_to(ROOT)) == "share/man/man1"
    for path, target in files.items():
        assert Path(target, path.name) == PAGES / path
    left_out = {
        path.relative_to(ROOT)
        for suffix in ("*.md", "*.json", "*.[ch]", "*.py", "*.toml", "*.yml", "Makefile")
        for path in (ROOT / "docs").rglob(suffix)
        if ".mod." not in path.name  # made by a build of the example in place
    } - set(files)
    assert not left_out
    assert {Path("README.md"), Path("CHANGELOG.md"), Path("LICENSE")} <= set(files)


def test_links_from_a_page_lead_to_another_one() -> None:
    files = set(data_files())
    for page in (path for path in files if path.suffix == ".md"):
        text = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\[[^\]]*\]\(([^)\s#]+)", text):
            if "://" not in target:
                found = (ROOT / page.parent / target).resolve().relative_to(ROOT)
                assert found in files or any(found in file.parents for file in files), f"{page}: {target}"


def test_every_command_is_in_the_manual() -> None:
    section = MANUAL.read_text().split(".SH COMMANDS")[1].split(".SH")[0]
    assert set(re.findall(r"^\.TP\n\.BR? (.*)$", section, re.MULTILINE)) == {
        *(set(COMMANDS) - {"bind", "unbind"}),
        'bind ", " unbind',
    }


def test_the_help_names_the_pages_where_they_are(tmp_path: Path) -> None:
    assert documentation(str(tmp_path)) is None
    (tmp_path / PAGES).mkdir(parents=True)
    assert documentation(str(tmp_path)) == f"Documentation: man kvmpass, and {tmp_path / PAGES}"


def test_the_pages_that_the_manual_names_are_there() -> None:
    named = re.findall(r"docs/\w+\.md", MANUAL.read_text())
    assert named
    assert {Path(name) for name in named} <= set(data_files())


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff: apt-get install groff makes it run")
def test_the_manual_is_well_formed() -> None:
    words = ["groff", "-man", "-Tascii", "-ww", "-z", str(MANUAL)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stderr == ""
