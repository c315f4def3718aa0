"""Artifacts of marked tests: files, caches, properties; also with pytest-xdist."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support.fake_lab import FAKE_LAB, write

from kvmpass.testing import artifacts

pytest_plugins = ["pytester"]


def suite(lab: pytest.Pytester) -> ET.Element:
    found = ET.parse(lab.path / "report.xml").getroot().find("testsuite")
    assert found is not None
    return found


def test_properties(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_one(record_property, record_testsuite_property, record_xml_attribute):
    record_property("mapped", 7)
    record_property("where", pathlib.Path("/x"))
    record_testsuite_property("host", "emulated")
    record_xml_attribute("requirement", "R-1")

@pytest.mark.amdvi(profile="large")
def test_other(record_testsuite_property): record_testsuite_property("other", 2)
""",
    )
    family = ("-o", "junit_family=xunit1")
    lab.runpytest_inprocess("--junitxml=report.xml", *family).assert_outcomes(passed=2)
    found = suite(lab)
    assert [(p.get("name"), p.get("value")) for p in found.findall("properties/property")] == [
        ("host", "emulated"),
        ("other", "2"),
    ]
    case = found.findall("testcase")[0]
    assert [(p.get("name"), p.get("value")) for p in case.findall("properties/property")] == [
        ("mapped", "7"),
        ("where", "/x"),
    ]
    assert case.get("requirement") == "R-1"
    lab.runpytest_inprocess(*family).assert_outcomes(passed=2)


def test_the_cache(lab: pytest.Pytester) -> None:
    """Values set inside are there in the next run, inside and outside. Failed tests are known outside only."""
    write(
        lab,
        """
@pytest.mark.amdvi
def test_inside(cache):
    cache.set("my/count", cache.get("my/count", 0) + 1)
    (cache.mkdir("mine") / "file").write_text("kept")

@pytest.mark.amdvi
def test_fails(): assert False

def test_outside(cache): cache.set("my/outside", cache.get("my/count", 0))
""",
    )
    lab.runpytest_inprocess().assert_outcomes(passed=2, failed=1)
    lab.runpytest_inprocess().assert_outcomes(passed=2, failed=1)
    kept = lab.path / ".pytest_cache"
    assert (kept / "v/my/count").read_text() == "2"
    assert (kept / "v/my/outside").read_text() == "1"
    assert (kept / "d/mine/file").read_text() == "kept"
    lab.runpytest_inprocess("--lf").assert_outcomes(failed=1)
    lab.runpytest_inprocess("-p", "no:cacheprovider", "-k", "test_fails").assert_outcomes(failed=1)


FILES = """
@pytest.mark.amdvi
def test_writes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/log").write_text("what was seen")
    (tmp_path / "link").symlink_to("deep/log")
    os.mkfifo(tmp_path / "fifo")

@pytest.mark.amdvi(profile="large")
def test_shares(tmp_path_factory):
    (tmp_path_factory.mktemp("shared") / "one").write_text("1")

@pytest.mark.amdvi
def test_leaves_nothing(tmp_path): pass
"""
SAME_NAME = """
@pytest.mark.amdvi(profile="large")
def test_writes(tmp_path): (tmp_path / "log").write_text("another")
"""
# In place of the overlay of an emulated host, which keeps what is written below a directory of its own.
ELSEWHERE = """
import shutil
run = FakeLab.run

def elsewhere(self, command, cwd, env, stdout, stderr):
    [at] = [word for word in command if word.startswith("--basetemp=")]
    inside = self.config.writable[0] / "inside" / at.rpartition("/")[2]
    plan = self.config.writable[0] / "plan.json"
    plan.write_text(plan.read_text().replace(at.partition("=")[2], str(inside)))
    inside.parent.mkdir()
    command = [f"--basetemp={inside}" if word == at else word for word in command]
    return run(self, command, cwd, env, stdout, stderr)

FakeLab.run = elsewhere
"""


def test_temporary_files(lab: pytest.Pytester, tmp_path: Path) -> None:
    """Their path outside is that inside."""
    lab.makeconftest(FAKE_LAB + ELSEWHERE)
    lab.makepyfile(
        test_a=f"import os, pytest\n{FILES}",
        test_b=f"import pytest\n{SAME_NAME}",
        test_c="def test_writes(tmp_path): pass",
    )
    result = lab.runpytest_inprocess("--basetemp", str(tmp_path / "out"))
    result.assert_outcomes(passed=5)
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert [name for name in found if not name.endswith("current")] == [
        *("base", "base/test_writes0", "base/test_writes0/deep", "base/test_writes0/deep/log"),
        "base/test_writes0/link",
        *("large", "large/shared0", "large/shared0/one", "large/test_writes0", "large/test_writes0/log"),
        "test_writes0",
    ]
    assert (tmp_path / "out/base/test_writes0/link").read_text() == "what was seen"


@pytest.mark.parametrize("how", ["assert False", "os.kill(os.getpid(), 9)"])
def test_files_of_a_failed_test(lab: pytest.Pytester, tmp_path: Path, how: str) -> None:
    """Also those of earlier tests, if its host dies."""
    lab.makeconftest(FAKE_LAB + ELSEWHERE)
    write(
        lab,
        f"""
@pytest.mark.amdvi
def test_writes(tmp_path): (tmp_path / "log").write_text("1")

@pytest.mark.amdvi
def test_fails(tmp_path):
    (tmp_path / "log").write_text("2")
    {how}
""",
    )
    lab.runpytest_inprocess("--basetemp", str(tmp_path / "out")).assert_outcomes(passed=1, failed=1)
    assert (tmp_path / "out/base/test_writes0/log").read_text() == "1"
    assert (tmp_path / "out/base/test_fails0").exists() == (how == "assert False")


def test_files_beyond_the_limit_are_dropped_with_a_warning(lab: pytest.Pytester, tmp_path: Path) -> None:
    lab.makeconftest(FAKE_LAB + ELSEWHERE + "from kvmpass.testing import artifacts\nartifacts.MAX_BYTES = 1000\n")
    write(
        lab,
        """
@pytest.mark.amdvi
def test_writes(tmp_path):
    (tmp_path / "a").write_text("small")
    (tmp_path / "b").write_bytes(bytes(1001))
""",
    )
    result = lab.runpytest_inprocess("--basetemp", str(tmp_path / "out"))
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*/test_writes0 was copied incompletely: b and the files after it exceed the limit"])
    assert [path.name for path in (tmp_path / "out/base/test_writes0").iterdir()] == ["a"]


def test_writable_directory_of_a_profile(lab: pytest.Pytester) -> None:
    """It is shared with the host, and created if it is missing."""
    lab.makeconftest(
        FAKE_LAB
        + """
from kvmpass.testing import Profile
def pytest_kvmpass_profiles():
    return {"keeping": Profile(writable=("results/deep",))}

def pytest_kvmpass_lab(lab):
    Path("writable").write_text("\\n".join(map(str, lab.writable)))
    return FakeLab(lab)
"""
    )
    write(
        lab,
        """
@pytest.mark.amdvi(profile="keeping")
def test_writes(): pathlib.Path("results/deep/file").write_text("kept")
""",
    )
    lab.runpytest_inprocess().assert_outcomes(passed=1)
    assert (lab.path / "results/deep/file").read_text() == "kept"
    assert str(lab.path / "results/deep") in (lab.path / "writable").read_text().splitlines()


def test_file_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "empty").mkdir(parents=True)
    assert artifacts.copy_tree(source, target) == ""
    assert not target.exists()
    for name in ("a", "b", "c"):
        (source / name).write_text(name)
    (source / "to").symlink_to("empty")
    (source / "nowhere").symlink_to("/nonexistent")
    os.mkfifo(source / "fifo")
    (source / "a").chmod(0o750)
    assert artifacts.copy_tree(source, target) == artifacts.copy_tree(source, target) == ""
    assert sorted(path.name for path in target.iterdir()) == ["a", "b", "c", "nowhere", "to"]
    assert (target / "to").is_symlink() and (target / "a").stat().st_mode & 0o777 == 0o750
    monkeypatch.setattr(artifacts, "MAX_FILES", 2)
    assert artifacts.copy_tree(source, tmp_path / "few") == "c and the files after it exceed the limit"
    assert len(list((tmp_path / "few").iterdir())) == 2


MANY = """
@pytest.mark.amdvi
@pytest.mark.parametrize("n", range(3))
def test_a(n): pass

@pytest.mark.amdvi(profile="large")
@pytest.mark.parametrize("n", [1, 2])
def test_b(n): assert n != 2

def test_outside(): pass
"""


@pytest.mark.parametrize("distribution", ["load", "loadfile", "worksteal"])
def test_with_xdist(lab: pytest.Pytester, distribution: str) -> None:
    """Each test is reported once, and the summary has the hosts of all workers."""
    write(lab, MANY)
    result = lab.runpytest_inprocess("-p", "xdist.plugin", "-n", "2", "--dist", distribution)
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["*= emulated hosts =*"])
    result.stdout.fnmatch_lines_random(["base (stock kernel, *tests*in all*", "large (stock kernel, *tests*in all*"])
