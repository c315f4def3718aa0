"""The plugin with a fake lab, which runs the command for inside on this machine."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from support.fake_lab import FAKE_LAB, boots, write

pytest_plugins = ["pytester"]


def test_one_report_for_inside_and_outside(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
def test_outside():
    assert "KVMPASS_LAB" not in os.environ

@pytest.mark.amdvi
def test_inside():
    assert os.environ["KVMPASS_LAB"]

@pytest.mark.amdvi
def test_fails():
    left, right = 1, 2
    assert left == right

@pytest.mark.amdvi
@pytest.mark.xfail
def test_xfails():
    assert False

@pytest.fixture
def broken():
    raise OSError("no such thing")

@pytest.mark.amdvi
def test_error(broken):
    pass

@pytest.mark.amdvi
def test_talks():
    print("hello from inside")
    assert False

def test_outside_too():
    pass
""",
    )
    result = lab.runpytest_inprocess("-v", "--junitxml=report.xml", "--durations=3", "-ra")
    result.assert_outcomes(passed=3, failed=2, errors=1, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "kvmpass: emulated AMD-Vi host, stock kernel, system QEMU",
            "*::test_outside PASSED*",
            "*::test_outside_too PASSED*",
            "*::test_inside PASSED*",
            "*::test_fails FAILED*",
            "*assert left == right*",
            "*hello from inside*",
            "*base (stock kernel, system QEMU): 5 tests*",
        ]
    )
    assert len(boots(lab)) == 1
    suite = ET.parse(lab.path / "report.xml").getroot().find("testsuite")
    assert suite is not None
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "7", "failures": "2", "errors": "1", "skipped": "1"}
    assert not list((lab.path / "temporary").glob("kvmpass-test-*/events.jsonl"))


def test_one_boot_for_each_profile(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_a(): pass

@pytest.mark.amdvi(profile="large")
def test_b(): pass

@pytest.mark.amdvi
def test_c(): pass

@pytest.mark.amdvi(kernel="stock")
def test_d(): pass
""",
    )
    lab.runpytest_inprocess("--lab-kernel=full").assert_outcomes(passed=4)
    assert boots(lab) == ["6G full system", "12G full system", "6G stock system"]


def test_profiles_of_a_conftest(lab: pytest.Pytester) -> None:
    lab.makeconftest(
        FAKE_LAB
        + """
from kvmpass.testing import Profile
def pytest_kvmpass_profiles():
    return {"tiny": Profile(memory="1G", roles={"nvme": "0000:aa:00.0"})}
"""
    )
    write(lab, "@pytest.mark.amdvi(profile='tiny')\ndef test_role(nvme): assert nvme == '0000:aa:00.0'")
    lab.runpytest_inprocess().assert_outcomes(passed=1)
    assert boots(lab) == ["1G stock system"]


@pytest.mark.parametrize("marker", ["profile='nonesuch'", "tiemout=3"])
def test_bad_marker_is_a_usage_error(lab: pytest.Pytester, marker: str) -> None:
    write(lab, f"@pytest.mark.amdvi({marker})\ndef test(): pass")
    result = lab.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*nonesuch*" if "nonesuch" in marker else "*tiemout*"])


def test_collect_only_boots_nothing(lab: pytest.Pytester) -> None:
    write(lab, "@pytest.mark.amdvi\ndef test(): pass")
    lab.runpytest_inprocess("--collect-only").stdout.fnmatch_lines(["*1 test collected*"])
    assert not boots(lab)


def test_unmarked_tests_boot_nothing(lab: pytest.Pytester) -> None:
    write(lab, "def test(): pass")
    lab.runpytest_inprocess().assert_outcomes(passed=1)
    assert not boots(lab)


def test_selection_and_last_failed(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
@pytest.mark.parametrize("n", [1, 2, 3])
def test_n(n):
    assert n != 2
""",
    )
    lab.runpytest_inprocess("-k", "n and (1 or 2)").assert_outcomes(passed=1, failed=1, deselected=1)
    lab.runpytest_inprocess("--lf").assert_outcomes(failed=1)


def test_stops_at_the_first_failure(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_fails(): assert False

@pytest.mark.amdvi
def test_sleeps(): time.sleep(120)
""",
    )
    lab.runpytest_inprocess("-x").assert_outcomes(failed=1)
    assert (lab.path / "stopped").exists()


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_ends_the_lab(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_interrupts():
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
""",
    )
    result = lab.runpytest_subprocess(timeout=50)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert (lab.path / "stopped").exists()
    assert not list((lab.path / "temporary").glob("kvmpass-test-*/events.jsonl"))


def test_strict_skips(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_skips(): pytest.skip("not today")

@pytest.mark.amdvi
@pytest.mark.skipif("KVMPASS_LAB" in os.environ, reason="inside")
def test_skipped_by_mark(): pass

@pytest.mark.amdvi
def test_missing_role(nvme9): pass
""",
    )
    with (lab.path / "conftest.py").open("a") as file:
        file.write(
            "\n@pytest.fixture\ndef nvme9(pytestconfig):\n"
            "    from kvmpass.testing.fixtures import device\n    return device(pytestconfig, 'nvme9')\n"
        )
    result = lab.runpytest_inprocess("-rs")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines_random(["SKIPPED*not today", "SKIPPED*inside", "SKIPPED*'base' has no nvme9*"])
    result = lab.runpytest_inprocess("-o", "kvmpass_strict_skips=true")
    result.assert_outcomes(failed=1, errors=2)
    result.stdout.fnmatch_lines(["*not today*", "*A skip inside * is a failure (kvmpass_strict_skips).*"])
    result.stdout.fnmatch_lines(["*the profile 'base' has no nvme9*"])


def test_a_test_that_is_skipped_outside_boots_no_host(lab: pytest.Pytester) -> None:
    """The test lacks something that only the machine outside can provide: not a failure, even with strict skips."""
    write(lab, "@pytest.mark.amdvi\ndef test_needs_it(): pass\n")
    with (lab.path / "conftest.py").open("a") as file:
        file.write(
            "\ndef pytest_collection_modifyitems(items):\n"
            "    items[0].add_marker(pytest.mark.skip('no network: FILE=PATH names one'))\n"
        )
    result = lab.runpytest_inprocess("-rs", "-o", "kvmpass_strict_skips=true")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*no network: FILE=PATH names one"])
    assert boots(lab) == []


def test_a_lab_that_dies(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_good(): pass

@pytest.mark.amdvi
def test_kills():
    os.write(2, b"last words")
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.amdvi
def test_after(): pass

@pytest.mark.amdvi
def test_long_after(): pass
""",
    )
    result = lab.runpytest_inprocess("-v", "--junitxml=report.xml")
    result.assert_outcomes(passed=1, failed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*::test_kills FAILED*",
            "*::test_after ERROR*",
            "*the emulated host died during *::test_kills: the host's kernel panicked*",
            "*console of the emulated host*",
            "Kernel panic - not syncing: fake",
        ]
    )
    result.stdout.fnmatch_lines(["*not run: the emulated host died during *::test_kills"])
    suite = ET.parse(lab.path / "report.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "1", "2")


@pytest.mark.parametrize("deaths", [1, 2])
def test_spare_hosts(lab: pytest.Pytester, deaths: int) -> None:
    """The test that ran, and those after it, run in another host, with a warning; the second death is a failure."""
    write(
        lab,
        f"""
import pathlib

@pytest.mark.amdvi
def test_good(): pass

@pytest.mark.amdvi
def test_kills():
    lives = pathlib.Path(__file__).with_name("lives")
    count = len(lives.read_text()) if lives.exists() else 0
    lives.write_text("x" * (count + 1))
    if count < {deaths}:
        os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.amdvi
def test_after(): pass
""",
    )
    result = lab.runpytest_inprocess("-o", "kvmpass_spare_hosts=1")
    result.stdout.fnmatch_lines(["*(* kernel, * QEMU): 1 tests,*DIED*REPLACED"])
    result.stdout.fnmatch_lines(["*the emulated host died during *::test_kills*", "*It was replaced.*"])
    if deaths == 1:
        result.assert_outcomes(passed=3, warnings=1)
    else:
        result.assert_outcomes(passed=1, failed=1, errors=1, warnings=1)


def test_the_pytest_inside_cannot_start(lab: pytest.Pytester) -> None:
    with (lab.path / "conftest.py").open("a") as file:
        file.write("\nif 'KVMPASS_LAB' in os.environ:\n    raise SystemExit('no way')\n")
    write(lab, "@pytest.mark.amdvi\ndef test_one(): pass\n\n@pytest.mark.amdvi\ndef test_two(): pass")
    result = lab.runpytest_inprocess()
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*the emulated host died before the first test*", "*no way*"])
    result.stdout.fnmatch_lines(["*not run: the emulated host died during the boot*"])


def test_a_lab_that_cannot_start(lab: pytest.Pytester) -> None:
    lab.makeconftest(
        """
from kvmpass.errors import LabError
class Lab:
    def run(self, *args, **kwargs): raise LabError("there is no QEMU", "install it")
    def cpu_time(self): return None
    def stop(self): pass
def pytest_kvmpass_lab(lab): return Lab()
"""
    )
    write(lab, "@pytest.mark.amdvi\ndef test_one(): pass")
    result = lab.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*LabError: there is no QEMU", "*hint: install it"])


def test_collection_error_inside(lab: pytest.Pytester) -> None:
    write(lab, "@pytest.mark.amdvi\ndef test_one(): pass")
    lab.makepyfile(
        test_bad="""
import os, pytest
if "KVMPASS_LAB" in os.environ:
    raise RuntimeError("not in here")

@pytest.mark.amdvi
def test_two(): pass
""",
        test_vanishes="""
import os, pytest

@pytest.mark.amdvi
@pytest.mark.parametrize("n", ["inside"] if "KVMPASS_LAB" in os.environ else ["outside"])
def test_three(n): pass
""",
    )
    result = lab.runpytest_inprocess()
    result.assert_outcomes(passed=1, errors=2)
    lines = ["*RuntimeError: not in here*", "*was not collected inside the emulated host*"]
    result.stdout.fnmatch_lines_random(lines)


def test_time_limit_of_a_test(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi(timeout=0.5)
def test_hangs(): time.sleep(60)

@pytest.mark.amdvi
def test_after(): pass
""",
    )
    result = lab.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Failed: call of test_hangs took longer than 0.5 s*"])


def test_a_host_that_hangs_is_ended(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpass.testing.hosts.GRACE", 1.0)
    write(
        lab,
        """
@pytest.mark.amdvi(timeout=1)
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)
""",
    )
    result = lab.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*was silent for 2 s during *::test_hangs and was ended*"])
    assert (lab.path / "stopped").exists()


def test_an_emulator_that_uses_no_cpu_time_is_ended(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the test's own limit."""
    monkeypatch.setattr("kvmpass.testing.hosts.STALL_LIMIT", 1.0)
    write(
        lab,
        """
@pytest.mark.amdvi
def test_stalls():
    if not pathlib.Path("first life").exists():
        pathlib.Path("first life").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
""",
    )
    result = lab.runpytest_inprocess("-o", "kvmpass_spare_hosts=1")
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*used no CPU time for 1 s during *::test_stalls and was ended*"])
    result.stdout.fnmatch_lines(["base (*: 0 tests*DIED*REPLACED", "base (*: 1 tests*"], consecutive=True)


def test_warnings_inside_are_reported(lab: pytest.Pytester) -> None:
    write(lab, "@pytest.mark.amdvi\ndef test_one(): warnings.warn('mind the gap', ResourceWarning)")
    result = lab.runpytest_inprocess("-W", "default")
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*ResourceWarning: mind the gap*"])


REQUIRING = """
@pytest.mark.amdvi
def test_any(): pass

@pytest.mark.amdvi(kernel="full")
def test_iommufd(): pass

@pytest.mark.amdvi(qemu="modern")
def test_modern(): pass

@pytest.mark.amdvi(kernel="full", qemu="modern")
def test_both(): pass

@pytest.mark.amdvi(kernel="stock", qemu="system")
def test_usual(): pass

@pytest.mark.amdvi(qemu="modern")
def test_modern_too(): pass
"""


def test_an_unavailable_kernel_or_qemu_is_a_skip_with_the_remedy(lab: pytest.Pytester) -> None:
    write(lab, REQUIRING)
    result = lab.runpytest_inprocess("-ra")
    result.assert_outcomes(passed=2, skipped=4)
    result.stdout.fnmatch_lines_random(
        [
            "SKIPPED*needs the full kernel (iommufd)*`kvmpass lab kernel` builds it, KVMPASS_LAB_KERNEL=FILE*",
            "SKIPPED*needs the modern QEMU*`kvmpass lab qemu` fetches it",
        ]
    )
    assert boots(lab) == ["6G stock system"]


def test_one_boot_for_each_kernel_and_qemu(lab: pytest.Pytester) -> None:
    for name in ("cache/qemu/modern", "cache/kernels/full/boot"):
        (lab.path / name).mkdir(parents=True)
    (lab.path / "cache/kernels/full/boot/vmlinuz-6.12").touch()
    write(lab, REQUIRING)
    result = lab.runpytest_inprocess("-v")
    result.assert_outcomes(passed=6)
    assert boots(lab) == ["6G stock system", "6G full system", "6G stock modern", "6G full modern"]
    result.stdout.fnmatch_lines_random(
        [
            "*base (stock kernel, system QEMU): 2 tests*",
            "*base (full kernel, system QEMU): 1 tests*",
            "*base (stock kernel, modern QEMU): 2 tests*",
            "*base (full kernel, modern QEMU): 1 tests*",
        ]
    )


@pytest.mark.parametrize("variable", [False, True], ids=["by option", "by variable"])
def test_a_full_kernel_in_addition_to_the_runs_own(
    lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, variable: bool
) -> None:
    """KVMPASS_LAB_KERNEL makes ``full`` the default; a path as --lab-kernel replaces ``full``."""
    write(lab, REQUIRING)
    if variable:
        monkeypatch.setenv("KVMPASS_LAB_KERNEL", "/some/bzImage")
        lab.runpytest_inprocess("--lab-kernel=stock").assert_outcomes(passed=3, skipped=3)
        assert boots(lab) == ["6G stock system", "6G full system"]
    else:
        lab.runpytest_inprocess("--lab-kernel=/some/bzImage").assert_outcomes(passed=3, skipped=3)
        assert boots(lab) == ["6G /some/bzImage system", "6G stock system"]


NEXT = """
@pytest.mark.amdvi
def test_any(): pass

@pytest.mark.amdvi(kernel="next")
def test_newest(): pass

@pytest.mark.amdvi(kernel="full")
def test_full(): pass

@pytest.mark.amdvi(qemu="system")
def test_old_qemu(): pass
"""


def test_the_next_kernel_has_the_modern_qemu(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    write(lab, NEXT)
    result = lab.runpytest_inprocess("-ra", "-k", "newest")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs the next kernel (Linux 7.3)*`kvmpass lab kernel --next` builds it*"])
    monkeypatch.setenv("KVMPASS_LAB_KERNEL_NEXT", "/some/bzImage")
    result = lab.runpytest_inprocess("-ra", "-k", "newest")
    result.stdout.fnmatch_lines(["SKIPPED*needs the modern QEMU*`kvmpass lab qemu` fetches it"])
    (lab.path / "cache/qemu/modern").mkdir(parents=True)
    lab.runpytest_inprocess("-k", "newest or any").assert_outcomes(passed=2)
    assert boots(lab) == ["6G stock system", "6G next modern"]


def test_a_run_on_the_next_kernel(lab: pytest.Pytester) -> None:
    write(lab, NEXT)
    result = lab.runpytest_inprocess("-ra", "--lab-kernel=next")
    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs the system QEMU*--lab-kernel=full makes it run"])
    assert boots(lab) == ["6G next modern"]
    result = lab.runpytest_inprocess("--lab-kernel=next", "--lab-qemu=system")
    result.stderr.fnmatch_lines(["*needs the modern QEMU: leave out --lab-qemu"])


def test_the_runs_own_kernel_and_qemu_are_never_a_reason_to_skip(lab: pytest.Pytester) -> None:
    write(lab, REQUIRING)
    lab.runpytest_inprocess("--lab-kernel=full", "--lab-qemu=modern").assert_outcomes(passed=6)
    assert boots(lab) == ["6G full modern", "6G stock system"]


def test_environment_variables_that_are_passed_on(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_NIGHT", "MY_DAY"):
        monkeypatch.setenv(name, "1")
    with (lab.path / "tox.ini").open("a") as file:
        file.write("\nkvmpass_environment = MY_NIGHT MY_ABSENT\n")
    write(lab, "@pytest.mark.amdvi\ndef test(): pass")
    lab.runpytest_inprocess().assert_outcomes(passed=1)
    names = (lab.path / "environment").read_text().splitlines()
    assert [name for name in names if name.startswith("MY_")] == ["MY_NIGHT"]


def test_class_and_module_markers_are_merged(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
pytestmark = pytest.mark.amdvi(profile="large")

class TestIt:
    @pytest.mark.amdvi(timeout=0.5)
    def test_hangs(self): time.sleep(60)
""",
    )
    lab.runpytest_inprocess().assert_outcomes(failed=1)
    assert boots(lab) == ["12G stock system"]


def test_role_without_the_marker_fails(lab: pytest.Pytester) -> None:
    write(lab, "def test(nvme): pass")
    result = lab.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the fixture nvme is for tests marked amdvi*"])


def test_hardware_that_does_not_exist(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPASS_TEST_NVME", "ffff:00:00.0")
    write(lab, "@pytest.mark.amdvi\ndef test(nvme): pass")
    result = lab.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*requests real hardware, but *"])
    assert not boots(lab)


def test_hardware_runs_in_place(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPASS_TEST_NVME", "0000:01:00.0")
    monkeypatch.setattr("kvmpass.testing.inplace.missing_hardware", lambda roles: None)
    write(
        lab,
        """
pytestmark = pytest.mark.amdvi

def test_has(nvme): assert nvme == "0000:01:00.0"

def test_lacks(nic): pass

@pytest.mark.destructive
def test_destroys(nvme): pass

@pytest.mark.amdvi(profile="no-svm")
def test_lab_only(): pass

def test_trace(iommu_trace): assert iommu_trace is None
""",
    )
    result = lab.runpytest_inprocess("-ra")
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            "kvmpass: real AMD-Vi, kernel *, nvme=0000:01:00.0",
            "*KVMPASS_TEST_NIC is not set*",
            "*KVMPASS_TEST_DESTRUCTIVE=1 is not set*",
            "*is for the emulated host only*",
        ]
    )
    monkeypatch.setenv("KVMPASS_TEST_DESTRUCTIVE", "1")
    lab.runpytest_inprocess().assert_outcomes(passed=3, skipped=2)
    assert not boots(lab)


@pytest.mark.parametrize("name, value", [("KVMPASS_TEST_NVEM", "0000:01:00.0"), ("KVMPASS_TEST_NVME", "nvme0")])
def test_bad_role_variable(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    result = lab.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{name}*"])
