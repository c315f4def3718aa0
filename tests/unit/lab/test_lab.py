"""A host that dies or hangs before the command has started is started once more, and only then."""

from __future__ import annotations

import pytest

from kvmpass.lab import Lab, LabConfig, LabResult


def run(
    monkeypatch: pytest.MonkeyPatch, *results: LabResult, stop: bool = False, timeout: float | None = None
) -> tuple[LabResult, int, list[str]]:
    said: list[str] = []
    left = list(results)
    lab = Lab(LabConfig(timeout=timeout), said.append)

    def once(*arguments: object) -> LabResult:
        if stop:
            lab.stop()
        return left.pop(0)

    monkeypatch.setattr(lab, "_once", once)
    return lab.run(["true"]), len(results) - len(left), said


DEAD = LabResult(None, "panic", "a\nlast words", 1.0, started=False)
GOOD = LabResult(0, "exited", "", 2.0, started=True)
LATER = LabResult(None, "panic", "x", 1.0, started=True)
HUNG = LabResult(None, "timeout", "x", 120.0, started=False)


def test_a_second_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    result, starts, said = run(monkeypatch, DEAD, GOOD)
    assert (result, starts) == (GOOD, 2)
    assert "  | last words" in said
    assert said[-1] == "starting the host once more"


def test_only_one_second_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, DEAD, DEAD, GOOD)[:2] == (DEAD, 2)


def test_a_boot_that_hangs_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, HUNG, GOOD)[:2] == (GOOD, 2)
    assert run(monkeypatch, HUNG, GOOD, timeout=120.0) == (HUNG, 1, []), "the timeout has expired"


@pytest.mark.parametrize("result", [GOOD, LATER])
def test_a_command_that_was_started_is_not_repeated(monkeypatch: pytest.MonkeyPatch, result: LabResult) -> None:
    assert run(monkeypatch, result, GOOD) == (result, 1, [])


def test_no_second_start_after_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, DEAD, GOOD, stop=True)[:2] == (DEAD, 1)


def test_stop_during_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several hosts may be starting at Ctrl-C: none of them delays the end."""
    done: list[str] = []

    class Starting:
        def __init__(self, *arguments: object) -> None:
            pass

        def __enter__(self) -> Starting:
            return self

        def __exit__(self, *arguments: object) -> None:
            done.append("closed")

        def start(self, job: object) -> None:
            lab.stop()

        def stop(self) -> None:
            done.append("stopped")

        def pump(self, outputs: object) -> None:
            pass

        def boot(self, patience: float) -> LabResult:
            assert done == ["stopped"]
            return DEAD

    monkeypatch.setattr("kvmpass.lab.lab.Host", Starting)
    lab = Lab(LabConfig())
    assert lab.run(["true"]) == DEAD
    assert done == ["stopped", "closed"]
