"""Teardown runs every step, in order, and says all that failed."""

from __future__ import annotations

import pytest

from kvmpass._teardown import run_all, undo_on_error


def test_every_step_runs_and_the_first_failure_is_raised() -> None:
    done: list[int] = []

    def step(number: int) -> None:
        done.append(number)
        if number % 2:
            raise OSError(f"step {number}")

    with pytest.raises(OSError, match="step 1") as failed:
        run_all(*[lambda number=number: step(number) for number in range(5)])  # type: ignore[misc]
    assert done == [0, 1, 2, 3, 4]
    assert failed.value.__notes__ == ["and afterwards: OSError: step 3"]
    run_all()


def test_a_failure_of_the_caller_gets_the_notes() -> None:
    failure = ValueError("first")

    def step() -> None:
        raise KeyboardInterrupt("then")

    run_all(step, failure=failure)
    assert failure.__notes__ == ["and afterwards: KeyboardInterrupt: then"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_that_raises_is_undone_backwards(fails: bool) -> None:
    done: list[str] = []
    try:
        with undo_on_error(lambda: done.append("first"), lambda: done.append("second")) as undo:
            undo.callback(done.append, "third")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert done == (["third", "second", "first"] if fails else [])


def test_callbacks_that_the_block_takes_over_run_when_they_are_closed() -> None:
    done: list[str] = []
    with undo_on_error(lambda: done.append("first")) as undo:
        undo.callback(done.append, "second")
        taken = undo.pop_all()
    assert not done
    taken.close()
    assert done == ["second", "first"]
