"""The pytest inside the lab: runs the tests of a plan in its order, and writes an event for each step.

The plan is a JSON file, named by ``KVMPASS_TEST_PLAN`` and written by :mod:`.session`: ``ids``, ``events`` (path of
the event file), ``profile``, ``roles`` (overrides), ``trace`` (path of the IOMMU's trace, or null), ``slowdown`` (by
which factor time limits are multiplied), ``temporary`` (where pytest's temporary files are) and ``files`` (the
directory for copies of them, which are moved to ``temporary`` outside).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from kvmpass.testing import artifacts
from kvmpass.testing.events import EventWriter, pack_report
from kvmpass.testing.state import State


class Inner:
    """The plugin inside a lab that another pytest booted (``KVMPASS_TEST_PLAN`` is set)."""

    def __init__(self, config: pytest.Config, plan: Path) -> None:
        self.config = config
        content = json.loads(plan.read_text())
        self.ids: list[str] = content["ids"]
        self.events = EventWriter(Path(content["events"]))
        self.collect_errors: list[tuple[str, str]] = []
        config.stash[artifacts.EVENTS] = self.events
        config.pluginmanager.register(artifacts, "kvmpass-artifact-fixtures")
        copier = artifacts.ArtifactCopier(Path(content["temporary"]), Path(content["files"]))
        config.pluginmanager.register(copier, "kvmpass-artifacts")
        state = State.of(config)
        state.profile = content["profile"]
        state.roles.update(content["roles"])
        state.slowdown = content["slowdown"]
        state.iommu_trace = Path(content["trace"]) if content["trace"] else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Select the tests of the plan, in its order."""
        by_id = {item.nodeid: item for item in items}
        items[:] = [by_id[wanted] for wanted in self.ids if wanted in by_id]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep errors and skips of the collection for the ``collected`` event."""
        if report.failed:
            self.collect_errors.append((report.nodeid, report.longreprtext))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.collect_errors.append((report.nodeid, reason))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write ``collected``."""
        self.events.put("collected", ids=[item.nodeid for item in session.items], errors=self.collect_errors)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write ``start``."""
        self.events.put("start", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write ``report``."""
        self.events.put("report", data=pack_report(self.config, report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write ``finish``."""
        self.events.put("finish", id=nodeid)

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        """Write ``warning``."""
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
        """Write ``end``, after all other plugins."""
        self.events.put("end", status=int(exitstatus))

    def pytest_unconfigure(self) -> None:
        """Close the event file."""
        self.events.close()
