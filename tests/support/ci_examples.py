"""The commands of the cookbook's files for CI."""

from __future__ import annotations

from typing import Any

import yaml

from support.repository import ROOT

CI = ROOT / "docs" / "examples" / "ci"


def _job(name: str) -> dict[str, Any]:
    parsed = yaml.safe_load((CI / name).read_text())
    job: dict[str, Any] = parsed["jobs"]["device"] if "jobs" in parsed else parsed["device"]
    return job


def github() -> list[str]:
    """The ``run`` of each step."""
    return [step["run"] for step in _job("github.yml")["steps"] if "run" in step]


def gitlab() -> list[str]:
    """The commands of ``script`` and ``after_script``."""
    return [*gitlab_script(), *gitlab_after()]


def gitlab_script() -> list[str]:
    """The commands of ``script``: one script, which ends at the first that fails."""
    script: list[str] = _job("gitlab.yml")["script"]
    return script


def gitlab_after() -> list[str]:
    """The commands of ``after_script``: one script, which ends at the first that fails."""
    after: list[str] = _job("gitlab.yml")["after_script"]
    return after
