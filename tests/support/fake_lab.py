"""A lab for tests of the plugin: it runs the command for inside on this machine."""

from __future__ import annotations

import pytest

FAKE_LAB = """
import os, signal, subprocess, threading, time
from pathlib import Path
import pytest
from kvmpass.lab.config import LabResult

class FakeLab:
    def __init__(self, config):
        self.config = config
        self.process = None

    def run(self, command, cwd, env, stdout, stderr):
        with Path("boots").open("a") as file:
            file.write(f"{self.config.memory} {self.config.kernel} {self.config.qemu}\\n")
        Path("environment").write_text("\\n".join(env))
        started = time.monotonic()
        env = {**os.environ, **env, "KVMPASS_LAB": "1"}
        self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        status = self.process.wait()
        seconds = time.monotonic() - started
        if status == -signal.SIGKILL:
            return LabResult(None, "panic", "Kernel panic - not syncing: fake", seconds)
        return LabResult(status, "exited", "the console", seconds)

    def cpu_time(self):
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except (AttributeError, OSError):
            return None
        return float(fields[11]) + float(fields[12])

    def stop(self):
        with Path("stopped").open("a") as file:
            file.write(f"{self.config.memory}\\n")
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)

def pytest_kvmpass_lab(lab):
    return FakeLab(lab)
"""


@pytest.fixture
def lab(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for name in (
        "KVMPASS_LAB",
        "KVMPASS_TEST_PLAN",
        "KVMPASS_LAB_KERNEL",
        "KVMPASS_LAB_KERNEL_NEXT",
        "PYTEST_ADDOPTS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("NVME", "NIC", "EDU"):
        monkeypatch.delenv(f"KVMPASS_TEST_{name}", raising=False)
    temporary = pytester.mkdir("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)  # its value is cached
    monkeypatch.setenv("KVMPASS_CACHE", str(pytester.path / "cache"))
    pytester.makeconftest(FAKE_LAB)
    # Loading other plugins would take seconds in each of many runs.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\naddopts = --strict-markers -p kvmpass.testing.plugin\nkvmpass_lab_jobs = 1\n")
    return pytester


def boots(lab: pytest.Pytester) -> list[str]:
    file = lab.path / "boots"
    return file.read_text().splitlines() if file.exists() else []


def write(lab: pytest.Pytester, body: str) -> None:
    lab.makepyfile(f"import os, pathlib, signal, sys, time, warnings\nimport pytest\n{body}")
