"""The Python examples of the documentation, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.repository import ROOT

# A block that is run has the name of its profile before it, in a comment that a page does not show.
_EXAMPLE = re.compile(r"^<!-- run: (?P<profile>[\w-]+) -->\n```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def examples(profile: str) -> list[pytest.param]:
    """Every example for a profile, with the place of its first line."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        for match in _EXAMPLE.finditer(text):
            if match["profile"] == profile:
                line = text.count("\n", 0, match.start("code"))
                found.append(pytest.param(path, line, match["code"], id=f"{path.stem}-{line + 1}"))
    return found


@pytest.mark.parametrize(("path", "line", "code"), examples("base"))
def test_example(path: Path, line: int, code: str) -> None:
    """It runs to its end, and what it asserts holds."""
    exec(compile("\n" * line + code, str(path), "exec"), {"__name__": "__main__"})
