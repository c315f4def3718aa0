"""Commands in guests that stay."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from samples import CLICK, KVMPASS, Bench, Job, elapsed

import kvmpass

NAME = "bench"
EXEC = [*KVMPASS, "exec", NAME, "--", "true"]
COMMANDS = 10


@contextmanager
def sessions(bench: Bench) -> Iterator[list[Job]]:
    """Measure one ``true``: by ``kvmpass exec``, and by ``Session.run``."""
    note, row = bench.samples.note, "kvmpass exec GUEST -- true, s"

    def each(run: object) -> float:
        assert callable(run)
        return elapsed(lambda: [run(["true"]) for _ in range(COMMANDS)]) / COMMANDS * 1000

    subprocess.run([*KVMPASS, "start", "--name", NAME, "--memory", "192M"], check=True, stdout=subprocess.DEVNULL)
    try:
        with kvmpass.start(memory="192M", name=f"{NAME}-library") as guest:
            yield [
                lambda: note(row, "kvmpass", elapsed(lambda: subprocess.run(EXEC, check=True))),
                lambda: note(row, "import click", elapsed(lambda: subprocess.run(CLICK, check=True))),
                lambda: note("one command in a guest, ms", "kvmpass", each(guest.run)),
                lambda: note("one command in a guest, ms", "on the host", each(subprocess.run)),
            ]
    finally:
        subprocess.run([*KVMPASS, "stop", NAME], check=True, stdout=subprocess.DEVNULL)
