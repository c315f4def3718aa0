"""A project of its own that uses the plugin: docs/examples/drive-lab, copied from the documentation and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support.inside import SOAK
from support.repository import ROOT

pytestmark = pytest.mark.amdvi(duration=70)
PROJECT = ROOT / "docs/examples/drive-lab"
TESTS = 20
# Hypothesis takes seconds to import, in each worker.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", "-v", "--color=no", "--junitxml=report.xml")
# What the project's own tests do not do: fail, and end a guest that they may not end.
FAILING = """
import pytest
from test_guest import GUEST

pytestmark = [pytest.mark.amdvi(profile="two-drives"), pytest.mark.guest(**GUEST)]

def test_fails(kvmpass_guest):
    kvmpass_guest.run(["sh", "-c", "echo this test alone >/dev/console"], check=True)
    assert kvmpass_guest.run(["false"]).returncode == 0

def test_fails_too(kvmpass_guest):
    kvmpass_guest.run(["sh", "-c", "echo another test >/dev/console"], check=True)
    kvmpass_guest.machine.unplug(kvmpass_guest.machine.devices[0])
    assert False

def test_ends_its_guest(kvmpass_guest):
    kvmpass_guest.run(["poweroff", "-f"], timeout=60)

@pytest.mark.guest(devices=("nvme", "nvme2"))
def test_wants_more(kvmpass_guest):
    pass
"""
Case = dict[str, str]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(PROJECT, tmp_path / "project")
    (tmp_path / "project/tests/test_failing.py").write_text(FAILING)
    return tmp_path / "project"


def run(project: Path, *arguments: str) -> tuple[str, dict[str, Case]]:
    """What pytest says, and of each test its result and its properties, from JUnit's report."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "KVMPASS_T"))}
    done = subprocess.run(
        [*PYTEST, *arguments],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    print(done.stdout)
    assert "PytestWarning" not in done.stdout
    cases: dict[str, Case] = {}
    for case in ET.parse(project / "report.xml").iter("testcase"):
        failed = [each.tag for each in case if each.tag in ("failure", "error", "skipped")]
        properties = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
        cases[case.attrib["name"]] = {"result": ", ".join(failed) or "passed", **properties}
    return done.stdout, cases


def boots(cases: dict[str, Case]) -> list[str]:
    return [name for name, case in cases.items() if float(case.get("guest_boot_seconds", 0)) > 0]


def section(output: str, test: str, title: str) -> str:
    """A section of a test's report of its failure, which ends at the next line of dashes or underscores."""
    report = re.split(rf"^_+ {test} _+\n", output, flags=re.MULTILINE)[1]
    content = re.split(rf"^-+ {title} -+\n", report, flags=re.MULTILINE)[1]
    return re.split(r"^(?:-+|_+|=+) .+ (?:-+|_+|=+)$", content, maxsplit=1, flags=re.MULTILINE)[0].strip()


def test_one_guest_for_twenty_tests(project: Path) -> None:
    output, cases = run(
        project, "tests/test_guest.py", "tests/test_failing.py", "--deselect=tests/test_failing.py::test_wants_more"
    )
    own = {name: case for name, case in cases.items() if "fails" not in name and name != "test_ends_its_guest"}
    assert [case["result"] for case in own.values()] == ["passed"] * TESTS
    assert boots(cases) == [next(iter(cases)), "test_another_guest_after_the_crash"]
    assert {len(case["sha256"]) for case in own.values() if "sha256" in case} == {64}
    assert (cases["test_fails"]["result"], cases["test_ends_its_guest"]["result"]) == ("failure", "error")
    assert section(output, "test_fails", "the guest's console") == "this test alone"
    assert section(output, "test_fails_too", "the guest's console") == "another test"
    events = section(output, "test_fails_too", "events of the guest's devices").splitlines()
    assert events[-1].endswith(": ejected by the guest"), events
    assert "the test has ended its guest: the guest powered off" in output


def test_two_workers(project: Path) -> None:
    pytest.importorskip("xdist", reason="pip install pytest-xdist makes it run")
    chosen = "test_guest or more" if SOAK else "blocks or packets or more"
    output, cases = run(project, "-n", "2", "tests/test_guest.py", "tests/test_failing.py", "-k", chosen)
    assert [cases.pop("test_wants_more")["result"]] == ["error"]
    assert "no nvme2 for this worker: 2 workers share 2 of the kind nvme" in output
    assert [case["result"] for case in cases.values()] == ["passed"] * (TESTS if SOAK else 11)
    assert {case["guest"] for case in cases.values()} == {"0000:00:04.0", "0000:00:05.0"}
    assert len(boots(cases)) in ((2, 3) if SOAK else (2,))
