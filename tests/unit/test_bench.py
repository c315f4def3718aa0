"""The script behind ``make bench``: what it makes of its samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
STAGES = [{"name": "imports & checks", "seconds": 1.0, "exits": 0}, {"name": "boot", "seconds": 3.0, "exits": 420}]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    import run

    return run


def test_ratios_of_medians_with_quartiles(bench: ModuleType) -> None:
    samples = {"boot, s": {"kvmpass": [2.0, 1.0, 9.0], "QEMU": [4.0, 4.0, 4.0], "C": [1.0]}}
    rows = bench.summary(samples)
    assert [(row["peer"], row["ratio"]) for row in rows] == [("QEMU", 0.5), ("C", 2.0)]
    assert rows[0]["kvmpass"] == (1.5, 2.0, 5.5)
    assert rows[1]["peer_quartiles"] == (1.0, 1.0, 1.0)
    assert "  0.50" in bench.text(rows) and "boot, s / QEMU" in bench.text(rows)


def test_the_picture_is_well_formed(bench: ModuleType) -> None:
    rows = bench.summary({"a < b": {"kvmpass": [90.0], "QEMU": [1.0]}, "c": {"kvmpass": [1.0], "QEMU": [4.0]}})
    picture = ElementTree.fromstring(bench.svg(rows, {"seconds": 4.0, "stages": STAGES}))
    words = [element.text for element in picture.iter() if element.text]
    assert "a < b / QEMU" in words and "boot: 3.00 s, 420 exits" in words
    bars = [element for element in picture.iter() if element.tag.endswith("rect")]
    assert all(float(bar.get("x", 0)) + float(bar.get("width", 0)) <= float(picture.get("width", 0)) for bar in bars)


def test_what_the_documents_say_is_what_was_measured(bench: ModuleType) -> None:
    document: dict[str, Any] = json.loads((ROOT / "docs" / "bench.json").read_text())
    again = json.loads(json.dumps(bench.summary(document["samples"])))
    assert document["rows"] == again
    assert (ROOT / "docs" / "bench.svg").read_text() == bench.svg(again, document["counts"]["a guest with a drive"])
    shown = (ROOT / "docs" / "attach-time.md").read_text()
    for row in document["rows"]:
        assert f"| {row['row']} | {row['peer']} | {row['ratio']:.2f} |" in shown
