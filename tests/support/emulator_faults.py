"""A test that fails because of a known fault of the emulator runs once more, and a warning keeps the evidence."""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

DOUBLE_FAULT = "traps: PANIC: double fault"
"""On the console of a guest of the emulated host: QEMU's TCG delivers an exception where none can be."""


class EmulatorFaults:
    """A plugin for the emulated host. There its own kernel dies of the same fault, and the host is replaced."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        failures = [report.longreprtext for report in reports if report.failed]
        evidence = [text for text in failures if DOUBLE_FAULT in text]
        if evidence:
            item.warn(pytest.PytestWarning(f"ran again: a guest died of a double fault\n{evidence[0]}"))
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True
