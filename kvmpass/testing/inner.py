"""The inside: runs the tests of a plan in its order and reports each step as an event.

The plan is a JSON file, named by ``KVMPASS_TEST_PLAN`` and written by :mod:`.session`: ``ids``, ``events`` (path of
the event file), ``profile``, ``roles`` (overrides), ``trace`` (path of the IOMMU's trace, or null), ``slowdown`` (by
how much time limits are stretched), ``temporary`` (where pytest's temporary files are) and ``files`` (a directory out
of which they are moved to the same place outside).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from kvmpass.testing import returning
from kvmpass.testing.events import Writer, pack_report
from kvmpass.testing.state import State


class Inner:
    """Registered where ``KVMPASS_TEST_PLAN`` is set: inside a lab that another pytest booted."""

    def __init__(self, config: pytest.Config, plan: Path) -> None:
        self.config = config
        content = json.loads(plan.read_text())
        self.ids: list[str] = content["ids"]
        self.events = Writer(Path(content["events"]))
        self.collect_errors: list[tuple[str, str]] = []
        config.stash[returning.EVENTS] = self.events
        config.pluginmanager.register(returning, "kvmpass-returning-fixtures")
        files = returning.Returning(Path(content["temporary"]), Path(content["files"]))
        config.pluginmanager.register(files, "kvmpass-returning")
        state = State.of(config)
        state.profile = content["profile"]
        state.roles.update(content["roles"])
        state.slowdown = content["slowdown"]
        state.iommu_trace = Path(content["trace"]) if content["trace"] else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_id = {item.nodeid: item for item in items}
        items[:] = [by_id[wanted] for wanted in self.ids if wanted in by_id]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collect_errors.append((report.nodeid, report.longreprtext))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.collect_errors.append((report.nodeid, reason))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.events.put("collected", ids=[item.nodeid for item in session.items], errors=self.collect_errors)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.events.put("start", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.events.put("report", data=pack_report(self.config, report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.events.put("finish", id=nodeid)

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        self.events.put(
            "warning",
            category=warning_message.category.__name__,
            message=str(warning_message.message),
            file=warning_message.filename,
            line=warning_message.lineno,
            when=when,
            id=nodeid,
            location=location,
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.events.put("end", status=int(exitstatus))

    def pytest_unconfigure(self) -> None:
        self.events.close()
