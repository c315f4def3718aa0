"""What repeats is let through now and then, and counted."""

from __future__ import annotations

import logging

import pytest

from kvmpass._log import Log
from kvmpass._ratelimit import RateLimit, limited_log, log_errors


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_silence_then_the_count() -> None:
    limit = RateLimit(3, 5.0, clock=(clock := Clock()))
    assert [limit.admit("a") for _ in range(5)] == [0, 0, 0, None, None]
    assert limit.admit("b") == 0, "another key"
    clock.now += 4.9
    assert limit.admit("a") is None
    clock.now += 0.1
    assert [limit.admit("a") for _ in range(4)] == [3, 0, 0, None]


def test_warnings_are_limited_by_their_format(caplog: pytest.LogCaptureFixture) -> None:
    """Not by their arguments, which a guest chooses; what was asked for (debugging) is not limited."""
    log = limited_log("kvmpass.test.limited")
    with caplog.at_level(logging.DEBUG, log.name):
        for number in range(1000):
            log.warning("guest wrote %d", number)
            log.debug("in detail: %d", number)
        log.warning("something else")
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert texts == [*(f"guest wrote {number}" for number in range(10)), "something else"]
    assert sum(record.levelno == logging.DEBUG for record in caplog.records) == 1000
    assert log.logger is not None
    (limit,) = (filter_ for filter_ in log.logger.filters)
    limit._limit._clock = lambda: 1e9  # type: ignore[union-attr]
    log.warning("guest wrote %d", 5)
    assert caplog.records[-1].getMessage() == "guest wrote 5 (990 similar messages suppressed)"


def test_an_error_of_a_block_is_logged_instead_of_raised(caplog: pytest.LogCaptureFixture) -> None:
    log = Log("kvmpass.test")
    with log_errors(log, "%s of %d: %s", "vector", 3):
        raise OSError("refused")
    with pytest.raises(ValueError), log_errors(log, "%s"):
        raise ValueError
    assert [record.getMessage() for record in caplog.records] == ["vector of 3: refused"]
