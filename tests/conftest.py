"""What all tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SCHEMAS = Path(__file__).parents[1] / "docs/schemas"


@pytest.fixture(scope="session")
def valid() -> Callable[[str, str | bytes], Any]:
    """``valid("list", text)`` reads a JSON document and holds it against docs/schemas/list.json."""

    def read(schema: str, text: str | bytes) -> Any:
        document = json.loads(text)
        jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text())).validate(document)
        return document

    return read
