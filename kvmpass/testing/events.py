"""The protocol between the pytest inside the lab and the one outside: JSON lines in a file.

Each line is an object with ``event``:

==================  =================================================================================
``collected``       ``ids``: the tests that were collected, in order; ``errors``: list of [node id, text]
``start``           ``id``: this test begins
``report``          ``data``: one report, as pytest serialises it
``finish``          ``id``: this test is over
``warning``         ``category``, ``message``, ``file``, ``line``, ``when``, ``id``, ``location``
``suite-property``  ``name``, ``value``: for JUnit's report
``xml-attribute``   ``id``, ``name``, ``value``: the same, of one test
``end``             ``status``: pytest's exit status
==================  =================================================================================
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from _pytest.junitxml import xml_key  # there is no public interface to the report

Event = dict[str, Any]
"""An event as read: ``event`` and the fields of its kind."""


class EventWriter:
    """Appends events to a file, without a buffer."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def put(self, event: str, **fields: Any) -> None:
        """Append an event with the fields that its kind has. Raises ``OSError``."""
        line = json.dumps({"event": event, **fields}, default=str, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class EventReader:
    """Reads events from a file while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def poll(self) -> list[Event]:
        """Return the events appended since the last call; an incomplete line is kept for the next one."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


def pack_report(config: pytest.Config, report: pytest.TestReport) -> dict[str, Any]:
    """Serialize a report, as pytest does."""
    packed = config.hook.pytest_report_to_serializable(config=config, report=report)
    assert isinstance(packed, dict)
    return packed


def unpack_report(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """Restore the report of :func:`pack_report`, with tuples where JSON has lists."""
    data = data | {name: [tuple(pair) for pair in data[name]] for name in ("sections", "user_properties")}
    data["location"] = tuple(data["location"])
    if data["outcome"] == "skipped" and isinstance(data["longrepr"], list):
        data["longrepr"] = tuple(data["longrepr"])
    report = config.hook.pytest_report_from_serializable(config=config, data=data)
    assert isinstance(report, pytest.TestReport)
    return report


def replay(config: pytest.Config, event: Event) -> None:
    """Apply an event other than a test's report to the pytest outside."""
    match event["event"]:
        case "warning":
            replay_warning(config, event)
        case "suite-property" | "xml-attribute":
            xml = config.stash.get(xml_key, None)
            if xml is not None and event["event"] == "suite-property":
                xml.add_global_property(event["name"], event["value"])
            elif xml is not None:
                xml.node_reporter(event["id"]).add_attribute(event["name"], event["value"])


def replay_warning(config: pytest.Config, event: Event) -> None:
    """Add a warning from inside to the summary outside; unknown categories become ``UserWarning``."""
    known = (ResourceWarning, DeprecationWarning, RuntimeWarning, pytest.PytestWarning)
    category = {kind.__name__: kind for kind in known}.get(event["category"], UserWarning)
    message = warnings.WarningMessage(
        message=category(event["message"]), category=category, filename=event["file"], lineno=event["line"]
    )
    location = tuple(event["location"]) if event["location"] else None
    config.hook.pytest_warning_recorded.call_historic(
        kwargs={"warning_message": message, "nodeid": event["id"], "when": event["when"], "location": location}
    )
