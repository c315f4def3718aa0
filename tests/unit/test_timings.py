from __future__ import annotations

import time

import pytest

from kvmpass.timings import Timings


def test_stages_follow_one_another_from_the_start_of_the_process() -> None:
    timings = Timings()
    started = time.monotonic()
    timings.mark("start")
    exits = 5
    timings.count_exits = lambda: exits
    timings.mark("boot")
    took = time.monotonic() - started
    exits = 12
    time.sleep(0.1)
    timings.mark("command")
    assert [(stage.name, stage.exits) for stage in timings.stages] == [("start", 0), ("boot", 5), ("command", 7)]
    start, boot, command = timings.stages
    assert start.seconds > 0 and start.cpu_seconds > 0, "of this process, before the object was made"
    assert boot.seconds <= took and command.seconds >= 0.1
    assert command.cpu_seconds < 0.1, "a sleep uses none"
    assert timings.seconds == pytest.approx(sum(stage.seconds for stage in timings.stages))
