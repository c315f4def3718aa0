"""What runs again in the emulated host, and what does not."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
runs = []

@pytest.fixture
def fresh():
    runs.append("set up")
    yield
    runs.append("torn down")

def test_hit_once(fresh):
    assert len(runs) > 1, "console: traps: PANIC: double fault, error_code: 0x0"
    assert runs == ["set up", "torn down", "set up"]

def test_hit_always():
    raise AssertionError("console: traps: PANIC: double fault, error_code: 0x0")

def test_fails_otherwise():
    runs.append("otherwise")
    assert runs.count("otherwise") > 1, "Oops"
"""


def test_only_a_double_fault_is_repeated_once(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
from support.emulator_faults import EmulatorFaults

def pytest_configure(config):
    config.pluginmanager.register(EmulatorFaults())
""")
    pytester.makepyfile(TESTS)
    result = pytester.runpytest("-p", "no:kvmpass")
    result.assert_outcomes(passed=1, failed=2, warnings=2)
    result.stdout.fnmatch_lines(["*ran again: a guest died of a double fault*"])
