from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

from kvmpass.cli.timings import Measured
from kvmpass.machine import Machine
from kvmpass.machine.vcpus import Accesses


def test_stages_and_exits_as_text_and_as_a_document() -> None:
    measured = Measured()
    measured.timings.mark("imports")
    assert [line.split()[-1] for line in measured.lines()] == ["stage", "imports", "total"], "without a machine"
    counts = {"Port": 0}
    accesses = {"01.0 bar0 MSI-X table": Accesses(1, 66), "COM1": Accesses(3, 2)}
    machine = SimpleNamespace(count_accesses=False, exit_reasons=counts, access_counts=accesses)
    measured.machine = cast(Machine, machine)
    assert machine.count_accesses
    counts["Port"] = 72
    measured.timings.mark("guest's boot")
    document = measured.document()
    assert [(stage["name"], stage["exits"]) for stage in document["stages"]] == [("imports", 0), ("guest's boot", 72)]
    assert document["accesses"][0] == {"accessed": "01.0 bar0 MSI-X table", "reads": 1, "writes": 66}
    shown = "\n".join(measured.lines())
    assert re.search(r"^ +\d+\.\d{3} +\d+\.\d{3} +72  guest's boot$", shown, re.MULTILINE)
    assert re.search(r"^ +1 +66  01\.0 bar0 MSI-X table$", shown, re.MULTILINE)
