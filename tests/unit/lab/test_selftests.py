"""The kernel's VFIO selftests: what is built, which devices each gets, what their TAP says."""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import build, selftests
from kvmpass.lab.config import LabConfig, LabResult
from kvmpass.lab.selftests import TapReader, Verdict

TAP = b"""TAP version 13
1..4
# selftests: vfio: vfio_a_test 0000:01:00.0
# TAP version 13
# 1..3
# ok 1 vfio_a.type1.map # SKIP no pages
# not ok 2 vfio_a.iommufd.map
# # FAILED: 1 / 3 tests passed.
# # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0
not ok 1 selftests: vfio: vfio_a_test # exit=1
# No driver found for device 0000:02:00.0
ok 2 selftests: vfio: vfio_b_test # SKIP
# # Totals: pass:35 fail:0 xfail:0 xpass:0 skip:0 error:0
ok 3 selftests: vfio: vfio_c_test
not ok 4 selftests: vfio: vfio_d_test # TIMEOUT 600 seconds
"""
VERDICTS = [
    Verdict("vfio_a_test", "failed", (1, 1, 1)),
    Verdict("vfio_b_test", "skipped"),
    Verdict("vfio_c_test", "passed", (35, 0, 0)),
    Verdict("vfio_d_test", "failed"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_tap_is_passed_on_and_read(chunk: int) -> None:
    target = io.BytesIO()
    reader = TapReader(target)
    for at in range(0, len(TAP), chunk):
        reader.write(TAP[at : at + chunk])
    assert (target.getvalue(), reader.verdicts) == (TAP, VERDICTS)


def test_the_summary_names_what_failed() -> None:
    assert selftests.summary(VERDICTS) == (
        "4 selftests: 36 cases passed, 1 failed, 1 skipped; failed: vfio_a_test, vfio_d_test"
    )
    assert selftests.summary(VERDICTS[1:3]) == "2 selftests: 35 cases passed, 0 failed, 0 skipped"
    assert selftests.summary([]) == "0 selftests: 0 cases passed, 0 failed, 0 skipped"


def tree(tmp_path: Path, recipe: str = "echo built > $(OUTPUT)/vfio_pci_device_test") -> Path:
    """A kernel source whose makefiles leave what the kernel's would."""
    folder = tmp_path / "linux" / selftests.FOLDER
    folder.mkdir(parents=True)
    (tmp_path / "linux" / "Makefile").write_text("headers:\n\t@true\n")
    (folder / "Makefile").write_text(f"all:\n\t{recipe}\n")
    return tmp_path / "linux"


def test_a_tree_is_built_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "missing_requirements", list)
    source, said = tree(tmp_path), list[str]()
    for _ in range(2):
        built = selftests.build(said.append, source)
        assert (selftests.programs(built), (built / "vfio_pci_device_test").read_text()) == (
            ["vfio_pci_device_test"],
            "built\n",
        )
    assert said == ["building the selftests of linux"] * 2
    assert not list((tmp_path / "linux" / selftests.FOLDER).glob("*_test")), "the tree has the sources only"


def test_the_next_kernels_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = []

    def unpack(recipe: object, folder: Path, say: object) -> Path:
        unpacked.append(recipe)
        return tree(folder)

    monkeypatch.setattr(selftests, "missing_requirements", list)
    monkeypatch.setattr(selftests, "unpack_source", unpack)
    for again in (False, False, True):
        assert selftests.programs(selftests.build(lambda _: None, again=again)) == ["vfio_pci_device_test"]
    assert len(unpacked) == 2


def test_a_test_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "missing_requirements", list)
    said: list[str] = []
    with pytest.raises(LabError, match=r"could not be built: a\.c:1: error: what"):
        selftests.build(said.append, tree(tmp_path, '@echo gcc -Werror; echo "a.c:1: error: what"; false'))
    assert "  | a.c:1: error: what" in said
    assert not selftests.cached(tmp_path).exists()


def test_what_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabError, match="has no tools/testing/selftests/vfio"):
        selftests.build(print, tmp_path)
    monkeypatch.setattr(selftests, "missing_requirements", list)
    with pytest.raises(LabError, match="does not contain tests"):
        selftests.build(print, tree(tmp_path, "true"))
    monkeypatch.setattr(selftests, "missing_requirements", lambda: ["uuid-dev"])
    with pytest.raises(LabError) as caught:
        selftests.build(print)
    assert caught.value.__notes__ == ["apt-get install uuid-dev"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "missing_packages", lambda tools: [])
    monkeypatch.setattr(selftests, "compiles", lambda header: False)
    assert selftests.missing_requirements() == ["uuid-dev"]
    monkeypatch.setattr(selftests, "missing_packages", lambda tools: ["gcc"])
    assert selftests.missing_requirements() == ["gcc"], "without a compiler nothing is known of its headers"


def test_names(tmp_path: Path) -> None:
    for name in ("vfio_b_test", "vfio_a_test", "vfio_a_test.o", "other"):
        (tmp_path / name).touch()
    assert selftests.choose(tmp_path, []) == ["vfio_a_test", "vfio_b_test"]
    assert selftests.choose(tmp_path, ["vfio_b_test", "vfio_b_test"]) == ["vfio_b_test"]
    with pytest.raises(LabError, match="no selftest other") as caught:
        selftests.choose(tmp_path, ["other"])
    assert caught.value.__notes__ == ["use some of vfio_a_test, vfio_b_test"]


def test_each_test_gets_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class FakeLab:
        def __init__(self, config: LabConfig, say: object) -> None:
            assert (config.kernel, config.qemu, config.devices) == ("next", "modern", ("igb", "edu"))

        def run(self, command: list[str], stdout: TapReader) -> LabResult:
            commands.append(command)
            stdout.write(TAP)
            return LabResult(0, "exited", "", 1.0)

    monkeypatch.setattr(selftests, "Lab", FakeLab)
    names = ["vfio_iommufd_setup_test", "vfio_pci_device_init_perf_test", "vfio_new_test"]
    config = selftests.configuration()
    result, verdicts = selftests.run(tmp_path, names, config, io.BytesIO(), print)
    assert (result.status, verdicts) == (0, VERDICTS)
    igb, edu = selftests.IGB, selftests.EDU
    assert commands[0][4:] == [
        str(tmp_path),
        str(selftests.SECONDS),
        f"vfio_iommufd_setup_test={edu}",
        f"vfio_pci_device_init_perf_test={igb},{edu}",
        f"vfio_new_test={igb}",
    ]


def test_the_script_runs_programs_as_the_kernels_runner_does(tmp_path: Path) -> None:
    """On this machine, with programs that need no device."""
    for name, body in (("pass", "echo a; echo b >&2"), ("skip", "exit 4"), ("fail", "exit 1"), ("hang", "sleep 30")):
        program = tmp_path / f"vfio_{name}_test"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    tests = [f"vfio_{name}_test=0xdead:0xbeef" for name in ("pass", "skip", "fail", "hang")]
    script = Path(selftests.__file__).with_name("selftests.sh")
    text = build.run_tool(["sh", script, tmp_path, "1", *tests], "the script failed")
    reader = TapReader(io.BytesIO())
    reader.write(text.encode())
    assert [(verdict.name, verdict.outcome) for verdict in reader.verdicts] == [
        ("vfio_pass_test", "passed"),
        ("vfio_skip_test", "skipped"),
        ("vfio_fail_test", "failed"),
        ("vfio_hang_test", "failed"),
    ]
    assert text.splitlines()[:5] == [
        "TAP version 13",
        "1..4",
        "# selftests: vfio: vfio_pass_test",
        "# a",
        "# b",
    ]
    assert "not ok 4 selftests: vfio: vfio_hang_test # TIMEOUT 1 seconds" in text
