"""Emulated hosts in parallel, with the fake lab. The report is the same as without parallel hosts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.fake_lab import FAKE_LAB, boots, write

from kvmpass.testing import capacity
from kvmpass.testing.hosts import CpuWatch

pytest_plugins = ["pytester"]

SIDE_BY_SIDE = ("-o", "kvmpass_lab_jobs=2")

# Tests that wait for one another's files.
MEETING = """
def wait_for(name):
    end = time.monotonic() + 60
    while not pathlib.Path(name).exists():
        assert time.monotonic() < end, f"{name} never came"
        time.sleep(0.02)

def meet(own, other):
    pathlib.Path(own).touch()
    wait_for(other)
"""
TWO_THAT_WAIT_FOR_EACH_OTHER = """
@pytest.mark.amdvi
def test_a(): meet("a", "b")

@pytest.mark.amdvi(profile="large")
def test_b(): meet("b", "a")
"""
# Fails if two hosts run at the same time.
TWO_THAT_FAIL_IN_PARALLEL = """
@pytest.mark.amdvi
def test_a():
    pathlib.Path("there").touch()
    time.sleep(0.5)
    pathlib.Path("there").unlink()

@pytest.mark.amdvi(profile="large")
def test_b():
    assert not pathlib.Path("there").exists()
"""


def stopped(lab: pytest.Pytester) -> list[str]:
    file = lab.path / "stopped"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def test_hosts_run_while_unmarked_tests_run(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "memory", lambda: 64 << 30)
    write(
        lab,
        MEETING
        + """
def test_outside(): meet("outside", "inside")

def test_outside_too(): assert len(pathlib.Path("boots").read_text().splitlines()) == 1

@pytest.mark.amdvi
def test_inside(): meet("inside", "outside")

@pytest.mark.amdvi(profile="large")
def test_later(): pass
""",
    )
    result = lab.runpytest_inprocess("-v", *SIDE_BY_SIDE)
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*::test_outside PASSED*", "*::test_outside_too PASSED*", "*::test_inside PASSED*"])


def test_hosts_run_in_parallel(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "memory", lambda: 64 << 30)
    write(lab, MEETING + TWO_THAT_WAIT_FOR_EACH_OTHER)
    result = lab.runpytest_inprocess(*SIDE_BY_SIDE)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["kvmpass: emulated AMD-Vi host, *, up to 2 at once", "base (*", "large (*"])
    assert sorted(boots(lab)) == ["12G stock system", "6G stock system"]


@pytest.mark.parametrize("way", ["jobs", "memory"])
def test_jobs_and_memory_limit_the_hosts(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """A host that needs more memory than there is runs alone."""
    monkeypatch.setattr(capacity, "memory", lambda: (64 if way == "jobs" else 8) << 30)
    write(lab, TWO_THAT_FAIL_IN_PARALLEL)
    lab.runpytest_inprocess("--lab-jobs", "1" if way == "jobs" else "2").assert_outcomes(passed=2)


def test_the_order_of_the_report_does_not_depend_on_which_host_ends_first(
    lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "memory", lambda: 64 << 30)
    write(
        lab,
        MEETING
        + """
@pytest.mark.amdvi
def test_first(): wait_for("last")

@pytest.mark.amdvi
def test_second(): assert 1 == 2, "as expected"

def test_outside(): assert not pathlib.Path("last").exists()

@pytest.mark.amdvi(profile="large")
def test_last(): pathlib.Path("last").touch()
""",
    )
    result = lab.runpytest_inprocess("-v", *SIDE_BY_SIDE)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["*::test_outside PASSED*", "*::test_first PASSED*", "*::test_second FAILED*", "*::test_last PASSED*"],
        consecutive=True,
    )


def test_the_host_with_the_longest_expected_duration_starts_first(lab: pytest.Pytester) -> None:
    write(
        lab,
        """
@pytest.mark.amdvi
def test_a(): pass

@pytest.mark.amdvi(profile="large")
@pytest.mark.parametrize("n", range(3))
def test_b(n): pass

@pytest.mark.amdvi(profile="devices")
@pytest.mark.parametrize("n", range(2))
def test_c(n): pass

@pytest.mark.amdvi(profile="sriov", duration=6.5)
def test_d(): pass
""",
    )
    result = lab.runpytest_inprocess("-v", *SIDE_BY_SIDE)
    result.assert_outcomes(passed=7)
    result.stdout.fnmatch_lines(["sriov (*", "large (*", "devices (*", "base (*"], consecutive=True)


def test_a_host_that_dies_does_not_affect_others(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "memory", lambda: 64 << 30)
    write(
        lab,
        MEETING
        + """
@pytest.mark.amdvi
def test_kills():
    meet("ready", "there")
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.amdvi
def test_after(): pass

@pytest.mark.amdvi(profile="large")
def test_good():
    meet("there", "ready")
    time.sleep(0.5)

@pytest.mark.amdvi(profile="large")
def test_good_too(): pass
""",
    )
    result = lab.runpytest_inprocess("-v", *SIDE_BY_SIDE)
    result.assert_outcomes(passed=2, failed=1, errors=1)
    result.stdout.fnmatch_lines(["base (*DIED*", "large (*: 2 tests, *s in all"], consecutive=True)


@pytest.mark.parametrize("end", ["dies", "hangs"])
def test_a_host_is_replaced_while_others_run(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """At once, not when its tests are reported: the first host waits for a file that the replacement makes."""
    monkeypatch.setattr(capacity, "memory", lambda: 64 << 30)
    monkeypatch.setattr("kvmpass.testing.hosts.GRACE", 0.5)
    how = {
        "dies": "os.kill(os.getpid(), signal.SIGKILL)",
        "hangs": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(600)",
    }
    write(
        lab,
        MEETING
        + f"""
@pytest.mark.amdvi
def test_waits(): wait_for("second life")

@pytest.mark.amdvi
def test_more(): pass

@pytest.mark.amdvi(profile="large", timeout=0.5)
def test_lives_twice():
    if not pathlib.Path("first life").exists():
        pathlib.Path("first life").touch()
        {how[end]}
    pathlib.Path("second life").touch()
""",
    )
    result = lab.runpytest_inprocess("-v", "-o", "kvmpass_spare_hosts=1", *SIDE_BY_SIDE)
    result.assert_outcomes(passed=3, warnings=1)
    result.stdout.fnmatch_lines(["base (*: 2 tests*", "large (*: 0 tests*DIED*REPLACED", "large (*: 1 tests*"])
    result.stdout.fnmatch_lines(["*::test_lives_twice PASSED*"])


INTERRUPTED = """
@pytest.mark.amdvi
def test_interrupts():
    meet("a", "b")
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)

@pytest.mark.amdvi(profile="large")
def test_sleeps():
    meet("b", "a")
    time.sleep(600)
"""


@pytest.mark.usefixtures("usual_signals")
def test_ctrl_c_ends_all_of_them(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.makeconftest(FAKE_LAB + "from kvmpass.testing import capacity\ncapacity.memory = lambda: 64 << 30\n")
    write(lab, MEETING + INTERRUPTED)
    result = lab.runpytest_subprocess(*SIDE_BY_SIDE, timeout=60)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert set(stopped(lab)) == {"12G", "6G"}
    result.stdout.fnmatch_lines(["base (*ended early", "large (*ended early"], consecutive=True)
    assert not list((lab.path / "temporary").glob("kvmpass-test-*/events.jsonl"))


def test_the_first_failure_ends_all_of_them(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "memory", lambda: 64 << 30)
    write(
        lab,
        MEETING
        + """
@pytest.mark.amdvi
def test_fails():
    meet("a", "b")
    assert False

@pytest.mark.amdvi
def test_not_reached(): time.sleep(600)

@pytest.mark.amdvi(profile="large")
def test_sleeps():
    meet("b", "a")
    time.sleep(600)
""",
    )
    lab.runpytest_inprocess("-x", *SIDE_BY_SIDE).assert_outcomes(failed=1)
    assert set(stopped(lab)) == {"12G", "6G"}


def test_time_limits_are_multiplied(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cpus", lambda: 1)
    write(
        lab,
        """
@pytest.mark.amdvi(timeout=0.5)
def test_hangs(): time.sleep(60)

@pytest.mark.amdvi(profile="large")
def test_other(): pass
""",
    )
    result = lab.runpytest_inprocess(*SIDE_BY_SIDE)
    result.stdout.fnmatch_lines(["*Failed: call of test_hangs took longer than 2 s*"])
    lab.runpytest_inprocess(*SIDE_BY_SIDE, "-k", "hangs").stdout.fnmatch_lines(["*took longer than 0.5 s*"])


def many(lab: pytest.Pytester, *counts: int) -> list[str]:
    for number, count in enumerate(counts):
        name = f"test_part{number}"
        body = f"import pytest\n@pytest.mark.amdvi\n@pytest.mark.parametrize('n', range({count}))\ndef test(n): pass"
        lab.makepyfile(**{name: body})
    return [f"test_part{number}.py::test[{n}]" for number, count in enumerate(counts) for n in range(count)]


@pytest.mark.parametrize(
    ("jobs", "counts", "lines"),
    [
        (1, (25, 25), ["base (stock kernel, system QEMU): 50 tests*"]),
        (2, (25, 25), ["*system QEMU, part 1 of 2): 25 tests*", "*system QEMU, part 2 of 2): 25 tests*"]),
        (2, (5, 20, 25), ["*, part 1 of 2): 25 tests*", "*, part 2 of 2): 25 tests*"]),
        (2, (20, 20, 20, 20), [f"*, part {number} of 4): 20 tests*" for number in range(1, 5)]),
        (2, (5, 5), ["base (stock kernel, system QEMU): 10 tests*"]),
        (2, (60,), ["base (stock kernel, system QEMU): 60 tests*"]),
    ],
    ids=["one at a time", "two", "two of three files", "twice as many as jobs", "few", "one file"],
)
def test_many_tests_of_one_kind_share_several_hosts(
    lab: pytest.Pytester, jobs: int, counts: tuple[int, ...], lines: list[str]
) -> None:
    """By file; the order is kept."""
    ids = many(lab, *counts)
    result = lab.runpytest_inprocess("-v", "--lab-jobs", str(jobs))
    result.assert_outcomes(passed=len(ids))
    assert [line.split()[0] for line in result.outlines if " PASSED" in line] == ids
    result.stdout.fnmatch_lines([*lines, "*passed*"], consecutive=True)


def test_long_tests_are_divided_by_their_expected_duration(lab: pytest.Pytester) -> None:
    many(lab, 1, 1, 4)
    for name, duration in (("test_part0.py", 50), ("test_part1.py", 30)):
        path = lab.path / name
        path.write_text(path.read_text().replace("mark.amdvi", f"mark.amdvi(duration={duration})"))
    lab.runpytest_inprocess(*SIDE_BY_SIDE).stdout.fnmatch_lines(
        ["*, part 1 of 2): 1 tests*", "*, part 2 of 2): 5 tests*"], consecutive=True
    )


@pytest.mark.parametrize("words", [("--lab-jobs=0",), ("--lab-jobs=many",), ("-o", "kvmpass_lab_jobs=-1")])
def test_an_invalid_number_of_jobs(lab: pytest.Pytester, words: tuple[str, ...]) -> None:
    write(lab, "def test(): pass")
    result = lab.runpytest_inprocess(*words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--lab-jobs, kvmpass_lab_jobs: must be a number from 1 on, or auto*"])


@pytest.mark.parametrize("cpus", [1, 3])
def test_one_host_for_each_cpu(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(capacity, "cpus", lambda: cpus)
    write(lab, "def test(): pass")
    line = "kvmpass: emulated AMD-Vi host, stock kernel, system QEMU"
    result = lab.runpytest_inprocess("--lab-jobs=auto")
    assert line + (", up to 3 at once" if cpus == 3 else "") in result.outlines


def test_an_invalid_profile(lab: pytest.Pytester) -> None:
    """Its tests fail, others do not."""
    lab.makeconftest(
        FAKE_LAB
        + """
from kvmpass.testing import Profile
def pytest_kvmpass_profiles():
    return {"odd": Profile(memory="lots")}
"""
    )
    write(lab, "@pytest.mark.amdvi(profile='odd')\ndef test_a(): pass\n\n@pytest.mark.amdvi\ndef test_b(): pass")
    result = lab.runpytest_inprocess()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*could not be started: LabError: 'lots' is not a memory size*", "*hint: write a number*"]
    )


@pytest.mark.parametrize(
    ("updates", "stalled"),
    [
        ([(0.5, 7.0), (0.5, 7.0), (0.5, 7.0)], 1.0),
        ([(0.5, 7.0), (0.5, 7.0), (0.5, 7.01)], 0.0),
        ([(0.5, 7.0), (3600.0, 7.0)], 1.0),
        ([(0.5, None), (0.5, None)], 0.0),
    ],
    ids=["no CPU time", "some", "this process was suspended", "unknown"],
)
def test_stalled(monkeypatch: pytest.MonkeyPatch, updates: list[tuple[float, float | None]], stalled: float) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = CpuWatch()
    for seconds, cpu_time in updates:
        now += seconds
        watch.update(cpu_time)
    assert watch.stalled == stalled


# --- capacity


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("quota", "count"), [("max 100000", 64), ("200000 100000", 2), ("50000 100000", 1), ("odd", 64), ("1 0", 64)]
)
def test_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert capacity.cpus(tmp_path) == 64
    put(tmp_path, "sys/fs/cgroup/cpu.max", quota)
    assert capacity.cpus(tmp_path) == count


def test_memory(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable:    8388608 kB\n")
    assert capacity.memory(tmp_path) == 8 << 30
    put(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/memory.current", f"{1 << 30}\n")
    assert capacity.memory(tmp_path) == 8 << 30
    put(tmp_path, "sys/fs/cgroup/memory.max", f"{4 << 30}\n")
    assert capacity.memory(tmp_path) == 3 << 30


@pytest.mark.parametrize(
    ("text", "size"), [("6G", 6 << 30), ("512m", 512 << 20), ("512", 512 << 20), ("1T", 1 << 40), ("lots", 0)]
)
def test_sizes(text: str, size: int) -> None:
    assert capacity.size(text) == size
