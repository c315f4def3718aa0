"""Artifacts of tests in an emulated host, copied out of it: files, and properties for JUnit's report."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvmpass.testing.events import EventWriter

# Limits for the directory of one test, or for one that tests share.
MAX_BYTES = 256 << 20
MAX_FILES = 10_000

EVENTS = pytest.StashKey[EventWriter]()


class ArtifactCopier:
    """Copies pytest's temporary directories below ``base`` to ``out``, which is shared with the machine outside."""

    def __init__(self, base: Path, out: Path) -> None:
        self._base, self._out = base, out
        base.parent.mkdir(parents=True, exist_ok=True)  # the host may have mounted a tmpfs over the directory outside

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Copy the test's ``tmp_path`` after all other teardowns: files that they removed are not copied."""
        try:
            return (yield)
        finally:
            path = getattr(item, "funcargs", {}).get("tmp_path")
            if isinstance(path, Path):
                self.copy_out(path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Copy directories of ``tmp_path_factory``, which tests share."""
        with suppress(OSError):
            for path in self._base.iterdir():
                if not (self._out / path.name).exists():
                    self.copy_out(path)

    def copy_out(self, path: Path) -> None:
        """Copy a directory to the one of the same name in ``out``. Warns if the copy is incomplete."""
        if path.is_symlink() or path.parent != self._base or not path.is_dir():
            return
        try:
            reason = copy_tree(path, self._out / path.name)
        except OSError as error:
            reason = str(error)
        if reason:
            warnings.warn(pytest.PytestWarning(f"{path} was copied incompletely: {reason}"), stacklevel=1)


@pytest.fixture(scope="session")
def record_testsuite_property(pytestconfig: pytest.Config) -> Callable[[str, object], None]:
    """Replace pytest's fixture: the property is added to the report outside."""
    events = pytestconfig.stash[EVENTS]
    return lambda name, value: events.put("suite-property", name=name, value=str(value))


@pytest.fixture
def record_xml_attribute(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Replace pytest's fixture: the attribute is added to the report outside."""
    events, nodeid = request.config.stash[EVENTS], request.node.nodeid
    return lambda name, value: events.put("xml-attribute", id=nodeid, name=name, value=str(value))


def copy_tree(source: Path, target: Path) -> str:
    """Copy the directories, regular files and symbolic links of one file system.

    Empty directories are not copied. Returns why the copy is incomplete, or an empty text. Raises ``OSError``.
    """
    here, count, used = source.stat().st_dev, 0, 0
    for folder, names, files in os.walk(source):
        at = target / Path(folder).relative_to(source)
        for name in sorted(names + files):
            path = Path(folder, name)
            state = path.lstat()
            if stat.S_ISDIR(state.st_mode):
                if state.st_dev != here:
                    names.remove(name)
                continue
            size = state.st_size if stat.S_ISREG(state.st_mode) else 0
            if count == MAX_FILES or used + size > MAX_BYTES:
                return f"{path.relative_to(source)} and the files after it exceed the limit"
            count, used = count + 1, used + size
            if stat.S_ISREG(state.st_mode) or stat.S_ISLNK(state.st_mode):
                at.mkdir(parents=True, exist_ok=True)
                (at / name).unlink(missing_ok=True)
                shutil.copy2(path, at / name, follow_symlinks=False)
    return ""


def move_artifacts(out: Path, base: Path) -> None:
    """Move the directories in ``out`` to ``base``, outside, where they have the same paths as inside."""
    for path in out.iterdir() if out.is_dir() else ():
        target = base / path.name
        with suppress(OSError):
            base.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(path, target)
