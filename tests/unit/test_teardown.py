"""Teardown runs every step, in order, and says all that failed."""

from __future__ import annotations

import pytest

from kvmpass._teardown import run_all


def test_every_step_runs_and_the_first_failure_is_raised() -> None:
    done: list[int] = []

    def step(number: int) -> None:
        done.append(number)
        if number % 2:
            raise OSError(f"step {number}")

    with pytest.raises(OSError, match="step 1") as failed:
        run_all([lambda number=number: step(number) for number in range(5)])  # type: ignore[misc]
    assert done == [0, 1, 2, 3, 4]
    assert failed.value.__notes__ == ["and afterwards: OSError: step 3"]
    run_all([])


def test_a_failure_of_the_caller_gets_the_notes() -> None:
    failure = ValueError("first")

    def step() -> None:
        raise KeyboardInterrupt("then")

    run_all([step], failure)
    assert failure.__notes__ == ["and afterwards: KeyboardInterrupt: then"]
