"""How the programs in C are built."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.command.build_ext import build_ext


def test_the_compiler_may_have_several_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(build_ext, "run", lambda self: None)
    found = runpy.run_path(str(Path(__file__).parents[2] / "setup.py"))
    build = found["BuildPrograms"](setuptools.Distribution())
    build.inplace, build.build_lib, build.spawn = False, str(tmp_path), commands.append
    build.compiler = SimpleNamespace(compiler=["ccache", "gcc", "-O2", "-g"])
    build.run()
    assert len(commands) == len(found["PROGRAMS"])
    assert all(command[:2] == ["ccache", "gcc"] and command[2].startswith("-std=") for command in commands)
