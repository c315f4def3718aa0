"""Packages whose names are imported, and regular expressions that are compiled, when they are first used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmpass
from kvmpass._lazy import lazy_pattern

ROOT = Path(kvmpass.__file__).parent
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT.parent).parts)
    for path in ROOT.rglob("__init__.py")
    if "lazy_names(" in path.read_text()
)


def declared(package: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the module by name: as type checkers see it, and in the table."""
    module = importlib.import_module(package)
    assert module.__file__ is not None
    seen, table = {}, {}
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvmpass."):
            seen |= {alias.asname: node.module for alias in node.names if alias.asname}
        if isinstance(node, ast.Dict):
            for key, names in ast.literal_eval(node).items():
                table |= dict.fromkeys(names, key)
    return seen, table


def test_there_are_such_packages() -> None:
    names = ("dma", "files", "guest", "host", "host.doctor", "kvm", "machine", "pci", "session", "vfio", "virtio")
    assert ["kvmpass", *(f"kvmpass.{name}" for name in names)] == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_same_names(package: str) -> None:
    seen, table = declared(package)
    assert seen == table
    assert list(table) == sorted(table, key=lambda name: (table[name], name))


@pytest.mark.parametrize("package", PACKAGES)
def test_each_name_is_that_of_its_module(package: str) -> None:
    module = importlib.import_module(package)
    _, table = declared(package)
    for name, source in table.items():
        assert getattr(module, name) is getattr(importlib.import_module(source), name)
    assert module.__all__ == sorted(table)
    assert set(table) <= set(dir(module))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = module.nonsense


def test_an_import_loads_nothing_else() -> None:
    script = "import sys, kvmpass.host; print(*[name for name in sys.modules if name.startswith('kvmpass')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"kvmpass", "kvmpass._lazy", "kvmpass.host"}


def test_the_first_import_is_short() -> None:
    """The command answers signals after it: before, Ctrl-C prints a traceback."""
    script = "import sys; before = {*sys.modules}; import kvmpass; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"typing", "re", "collections", "enum"} & set(done.stdout.split())


def test_a_pattern_is_compiled_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = re.compile

    def compile_(text: str, flags: int = 0) -> re.Pattern[str]:
        compiled.append(text)
        return original(text, flags)

    monkeypatch.setattr(re, "compile", compile_)
    pattern = lazy_pattern("(a+)b", re.IGNORECASE)
    assert compiled == []
    for _ in range(2):
        match = pattern.fullmatch("AAB")
        assert match is not None and match[1] == "AA"
    assert compiled == ["(a+)b"]
    assert pattern.pattern == "(a+)b"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pattern.nonsense  # type: ignore[attr-defined]


def test_no_module_compiles_a_pattern_when_it_is_imported() -> None:
    for path in ROOT.rglob("*.py"):
        assert not re.search(r"^\w+ = re\.compile", path.read_text(), re.MULTILINE), path.relative_to(ROOT)
