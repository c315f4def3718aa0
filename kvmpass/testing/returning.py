"""What tests leave behind inside an emulated host, brought out: files, and properties for JUnit's report."""

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

from kvmpass.testing.events import Writer

# Of one test, or of one directory that tests share: what is more stays inside.
MOST_BYTES = 256 << 20
MOST_FILES = 10_000

EVENTS = pytest.StashKey[Writer]()


class Returning:
    """Inside: hands on files below ``base``, where pytest's temporary ones are, by way of ``out``."""

    def __init__(self, base: Path, out: Path) -> None:
        self._base, self._out = base, out
        base.parent.mkdir(parents=True, exist_ok=True)  # a file system of its own may lie over what is there outside

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """After everything else: whatever has been removed by then is not wanted."""
        try:
            return (yield)
        finally:
            path = getattr(item, "funcargs", {}).get("tmp_path")
            if isinstance(path, Path):
                self.bring(path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """What several tests shared: directories that were made by ``tmp_path_factory``."""
        with suppress(OSError):
            for path in self._base.iterdir():
                if not (self._out / path.name).exists():
                    self.bring(path)

    def bring(self, path: Path) -> None:
        """Copy a directory out, below its own name. What cannot be copied is left, with a warning."""
        if path.is_symlink() or path.parent != self._base or not path.is_dir():
            return
        try:
            left = copy(path, self._out / path.name)
        except OSError as error:
            left = str(error)
        if left:
            warnings.warn(pytest.PytestWarning(f"not all of {path} is brought out: {left}"), stacklevel=1)


@pytest.fixture(scope="session")
def record_testsuite_property(pytestconfig: pytest.Config) -> Callable[[str, object], None]:
    """As pytest's own; the property goes into the report outside."""
    events = pytestconfig.stash[EVENTS]
    return lambda name, value: events.put("suite-property", name=name, value=str(value))


@pytest.fixture
def record_xml_attribute(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """As pytest's own; the attribute goes into the report outside."""
    events, nodeid = request.config.stash[EVENTS], request.node.nodeid
    return lambda name, value: events.put("xml-attribute", id=nodeid, name=name, value=str(value))


def copy(source: Path, target: Path) -> str:
    """Copy directories, regular files and symbolic links of one file system; returns what was left, or nothing.

    Empty directories are no reason to make ``target``.
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
            if count == MOST_FILES or used + size > MOST_BYTES:
                return f"{path.relative_to(source)} and what follows are too much"
            count, used = count + 1, used + size
            if stat.S_ISREG(state.st_mode) or stat.S_ISLNK(state.st_mode):
                at.mkdir(parents=True, exist_ok=True)
                (at / name).unlink(missing_ok=True)
                shutil.copy2(path, at / name, follow_symlinks=False)
    return ""


def receive(out: Path, base: Path) -> None:
    """Outside: put what came where the same names were inside."""
    for path in out.iterdir() if out.is_dir() else ():
        target = base / path.name
        with suppress(OSError):
            base.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(path, target)
