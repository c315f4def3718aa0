"""docs/troubleshooting.md is what the catalogue of ``kvmpass doctor`` says."""

from __future__ import annotations

import runpy

from support.repository import ROOT

from kvmpass.host.doctor import CATALOGUE


def test_the_document_is_the_catalogue() -> None:
    made = runpy.run_path(str(ROOT / "scripts/troubleshooting.py"))["document"]()
    text = (ROOT / "docs/troubleshooting.md").read_text()
    assert text == made, "run scripts/troubleshooting.py"
    for check in CATALOGUE:
        assert f"## {check.title}\n" in text
        assert all(f"### `{template.kind}`" in text for template in check.templates)
