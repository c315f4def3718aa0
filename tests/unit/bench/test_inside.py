"""The jobs of a section: their rounds, their failures, their limit."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]


class Stage:
    """A section of two jobs: one fails as often as it is told to, the other measures."""

    def __init__(self, script: Script, folder: Path, fail: Callable[[], None], failures: int) -> None:
        self.samples, self.inside = script("samples"), script("inside")
        self.bench = self.samples.Bench(self.samples.Samples(), folder, {})
        self.order: list[str] = []
        self._result, self._fail, self._failures = folder / "result", fail, failures

    @contextlib.contextmanager
    def section(self, bench: Any) -> Iterator[list[Callable[[], object]]]:
        yield [self.first, lambda: self.note("second")]

    def first(self) -> None:
        self.note("first")
        if self.order.count("first") <= self._failures:
            self._fail()

    def note(self, row: str) -> None:
        self.order.append(row)
        self.bench.samples.note(row, "kvmpass", 1.0)

    def measure(self, rounds: int) -> dict[str, Any]:
        """Measure; return what was saved."""
        self.inside.measure(self.bench, "section", rounds, self._result)
        found: dict[str, Any] = json.loads(self._result.read_text())
        assert found["done"] == {"section": rounds}
        return found


@pytest.fixture
def stage(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    def make(fail: Callable[[], None], failures: int) -> Stage:
        made = Stage(script, tmp_path, fail, failures)
        monkeypatch.setattr(made.inside, "SECTIONS", {"section": made.section})
        return made

    return make


def refuse() -> None:
    error = OSError("a fault of the emulator")
    error.add_note("on the console last:\nPANIC")
    raise error


def test_a_job_that_fails_is_repeated(stage: Callable[..., Stage], capsys: pytest.CaptureFixture[str]) -> None:
    made = stage(refuse, 2)
    found = made.measure(2)
    assert made.order == ["first"] * 3 + ["second"] * 2 + ["first"], "every second round is backwards"
    assert found["samples"] == {"first": {"kvmpass": [1.0, 1.0]}, "second": {"kvmpass": [1.0, 1.0]}}
    assert found["repeated"] == {"section": ["OSError: a fault of the emulator\non the console last:\nPANIC"] * 2}
    assert not found["failures"] and "a fault of the emulator" in capsys.readouterr().err


def test_a_job_that_goes_on_failing_is_left_out(stage: Callable[..., Stage]) -> None:
    made = stage(refuse, 99)
    found = made.measure(3)
    assert made.order == ["first"] * (1 + made.samples.REPEATS) + ["second"] * 3
    assert found["samples"] == {"second": {"kvmpass": [1.0] * 3}}
    assert [len(found[name]["section"]) for name in ("repeated", "failures")] == [made.samples.REPEATS, 1]


def test_a_job_that_hangs_is_ended(stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its children, of which one has the pipe that is read."""

    def hang() -> None:
        with made.samples.running(["sh", "-c", "sleep 600 & wait"], stdout=subprocess.PIPE) as child:
            child.stdout.read()

    made = stage(hang, 1)
    monkeypatch.setattr(made.inside, "SECONDS", 0.5)
    started = time.monotonic()
    found = made.measure(1)
    assert found["repeated"] == {"section": ["TimeLimit: not done after 0 s"]} and not found["failures"]
    assert found["samples"]["first"] == {"kvmpass": [1.0]} and time.monotonic() - started < 300


def test_a_job_that_ignores_errors_of_the_system_is_ended(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> None:
        with contextlib.suppress(OSError):
            time.sleep(600)

    made = stage(hang, 1)
    monkeypatch.setattr(made.inside, "SECONDS", 0.5)
    assert made.measure(1)["repeated"] == {"section": ["TimeLimit: not done after 0 s"]}


def test_a_section_that_does_not_begin_is_ended(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = stage(refuse, 0)

    @contextlib.contextmanager
    def section(bench: Any) -> Iterator[list[Callable[[], object]]]:
        time.sleep(600)
        yield []

    monkeypatch.setattr(made.inside, "SECTIONS", {"section": section})
    monkeypatch.setattr(made.inside, "SECONDS", 0.5)
    with pytest.raises(made.inside.TimeLimit, match="not done after"):
        made.inside.measure(made.bench, "section", 1, tmp_path / "result")


def test_cpu_time_is_that_of_a_program_alone(script: Script) -> None:
    samples = script("samples")
    assert 0 <= samples.spent(["true"]) < 60_000
    with pytest.raises(subprocess.CalledProcessError):
        samples.spent([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_error_says_how_far_a_guest_has_come(script: Script, tmp_path: Path) -> None:
    guests, console = script("guests"), tmp_path / "console"
    console.write_bytes(b"".join(b"%d \xff%s\r\n" % (line, b"x" * 500) for line in range(50)))
    said = deque(["end drive 1.0 2.0", "begin up"], maxlen=guests.LINES)
    with pytest.raises(TimeoutError) as caught, guests.explained(said, console):
        raise TimeoutError("QEMU's guest hangs")
    script_says, on_the_console = caught.value.__notes__
    assert script_says == "said last:\nend drive 1.0 2.0\nbegin up"
    lines = on_the_console.splitlines()
    assert len(lines) == 1 + guests.LINES and max(map(len, lines)) == guests.WIDTH and lines[-1].startswith("49 ")
    with pytest.raises(TimeoutError) as caught, guests.explained(said):
        raise TimeoutError
    assert len(caught.value.__notes__) == 1


def test_data_has_a_goal_beside_qemu(script: Script) -> None:
    goals, rows = script("report").GOALS, script("guests").ROWS
    assert all((rows[phase], "QEMU") in goals for phase in ("drive", "up", "down"))
