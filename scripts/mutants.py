#!/usr/bin/env python3
"""Mutation testing of what keeps a guest and its devices inside their own memory, with cosmic-ray's operators.

Each mutant is one small fault: a comparison, an arithmetic operator, a condition turned round, a number off by one, a
call left out. It is put into a copy of the tree, and the unit tests run against it: those that a file is named after
first, then the others. A mutant that fails a test or takes too long is killed. What survives is printed as a diff
and must be explained in tests/mutants.toml, as equivalent or by the test in the emulated host that kills it.

Exit status: 0 if enough mutants are killed and every survivor is explained, 1 if not, 2 if the tests fail without
a mutant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies  # noqa: F401 (imported here for all forks)
import jsonschema  # noqa: F401
import pytest
from mutation import Mutant, choose, every

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "tests/mutants.toml"
TARGETS = (
    "kvmpass/dma",
    "kvmpass/layout.py",
    "kvmpass/memory",
    "kvmpass/pci",
    "kvmpass/kvm/memslots.py",
    "kvmpass/kvm/routing.py",
    "kvmpass/virtio/queue.py",
    "kvmpass/virtio/transport.py",
    "kvmpass/guest/agent.py",
    "kvmpass/guest/frames.py",
    "kvmpass/guest/input.py",
    "kvmpass/guest/process.py",
    "kvmpass/session/messages.py",
    "kvmpass/_teardown.py",
)
SEED, NUMBER, THRESHOLD = 9, 200, 90.0
NEAR = (  # their tests
    *("dma/", "memory/", "kvm/", "pci/", "virtio/", "assignment/", "test_layout", "test_pciregs"),
    *(f"guest/test_{name}" for name in ("agent", "frames", "input", "process")),
    "session/test_messages",
)
ADDRESS_SPACE = 16 << 30  # bytes: a mutant that allocates without end is killed by this, not by the machine
FACTOR, SLACK, WAITING = 3.0, 3.0, 10.0  # processor time: times what the tests need, and seconds; on the clock: more
NICE = 5


# --- the explained ones


@dataclass(frozen=True)
class Explanation:
    """An entry of tests/mutants.toml: the changed lines without indentation, and why no unit test fails."""

    file: str
    was: str
    now: str
    why: str
    test: str = ""


def explanations(path: Path = EXPLAINED) -> list[Explanation]:
    """Raises ``ValueError`` for an entry whose line or test no longer exists: it explains nothing any more."""
    entries = [Explanation(**entry) for entry in tomllib.loads(path.read_text()).get("survivor", [])]
    for entry in entries:
        have = [line.strip() for line in (ROOT / entry.file).read_text().splitlines()]
        if not all(line in have for line in entry.was.splitlines()):
            raise ValueError(f"{path.name}: {entry.file} has no line {entry.was!r} any more: remove the entry")
        file, _, name = entry.test.partition("::")
        if entry.test and f"def {name}(" not in (ROOT / file).read_text():
            raise ValueError(f"{path.name}: there is no test {entry.test}")
    return entries


def explained(mutant: Mutant, entries: Iterable[Explanation]) -> Explanation | None:
    """The entry for ``mutant``. An entry whose ``now`` ends in ``*`` refers to all that begin as it does."""
    was, now = mutant.changed
    for entry in entries:
        same = now.startswith(entry.now[:-1]) if entry.now.endswith("*") else now == entry.now
        if (entry.file, entry.was) == (mutant.file, was) and same:
            return entry
    return None


# --- running tests


class Tree:
    """A copy of the work tree in which mutants are tried; ``close()`` removes it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="kvmpass-mutants-"))
        ignore = shutil.ignore_patterns(
            ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "dist", "build", "*.egg-info"
        )
        shutil.copytree(ROOT, self.path / "tree", ignore=ignore, symlinks=True)
        self.tree = self.path / "tree"
        (self.path / "tmp").mkdir()
        unit = self.tree / "tests/unit"
        names = sorted(str(path.relative_to(unit)) for path in unit.rglob("test_*.py"))
        self._near = [name for name in names if name.startswith(NEAR)]
        self._rest = [name for name in names if name not in self._near]
        self._limits: dict[tuple[str, ...], float] = {}

    def close(self) -> None:
        shutil.rmtree(self.path)

    def measure(self, thorough: bool) -> bool:
        """Run the tests without a mutant: whether they pass. What a mutant may take follows from it."""
        return all(self._limit(names) for names in self._stages("", thorough))

    def _stages(self, file: str, thorough: bool) -> list[list[str]]:
        """Which tests run one after the other until some fail; without a ``file`` those that are for all of them."""
        named = [name for name in self._near if file and name.startswith(_named_after(file))]
        stages = [named, self._near, self._rest if thorough else []]
        return [stage for stage in stages if stage]

    def _limit(self, names: list[str]) -> float:
        """Processor time for these tests in seconds; 0 if they fail without a mutant."""
        key = tuple(names)
        if key not in self._limits:
            passed, seconds = self._run(names, None)
            self._limits[key] = seconds * FACTOR + SLACK if passed else 0.0
        return self._limits[key]

    def kills(self, mutant: Mutant, thorough: bool) -> bool:
        """Whether the unit tests fail with ``mutant``; ``thorough``: all, not only those of these packages."""
        stages = self._stages(mutant.file, thorough)
        limits = [self._limit(names) for names in stages]
        path = self.tree / mutant.file
        try:
            path.write_text(mutant.after)
            self._forget(path)
            return not all(self._run(names, limit)[0] for names, limit in zip(stages, limits, strict=True))
        finally:
            path.write_text(mutant.before)
            self._forget(path)

    @staticmethod
    def _forget(path: Path) -> None:
        """Its bytecode is taken for current while size and second of the source are the same."""
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def _run(self, names: list[str], limit: float | None) -> tuple[bool, float]:
        """Whether the tests pass within ``limit`` seconds of processor time, and how many they took.

        In a fork of this process, which has imported all that is not the project's: that halves the time.
        """
        pid = os.fork()
        if not pid:
            try:
                os._exit(self._child(names, limit))
            finally:
                os._exit(99)
        try:
            with open_pidfd(pid) as ended:
                ended.poll(None if limit is None else int((limit * WAITING + SLACK) * 1000))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        return status == 0, usage.ru_utime + usage.ru_stime

    def _child(self, names: list[str], limit: float | None) -> int:
        """The current directory comes first among the places that modules are imported from."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.nice(NICE)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 1))
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(nothing, fd)
        os.chdir(self.tree)
        sys.path[0] = str(self.tree)
        os.environ.update(PYTHONPATH=str(self.tree), TMPDIR=str(self.path / "tmp"))
        tempfile.tempdir = None
        files = [f"tests/unit/{name}" for name in names]
        return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--disable-warnings", *files]))


@contextlib.contextmanager
def open_pidfd(pid: int) -> Iterator[select.poll]:
    """Something to poll that becomes readable when ``pid`` ends."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        yield poll
    finally:
        os.close(fd)


def _named_after(file: str) -> str:
    """``kvmpass/pci/bar.py``: pci/test_bar and what begins with that."""
    path = Path(*Path(file).with_suffix("").parts[1:])
    return str(path.with_name(f"test_{path.name}"))


# --- the command


def _sources(wanted: Sequence[str] = ()) -> dict[str, str]:
    """The text of the files that are mutated, by path."""
    found: dict[str, str] = {}
    for target in TARGETS:
        path = ROOT / target
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found[str(file.relative_to(ROOT))] = file.read_text()
    if unknown := set(wanted) - set(found):
        raise SystemExit(f"not mutated: {' '.join(sorted(unknown))}; these are: {' '.join(found)}")
    return {file: text for file, text in found.items() if not wanted or file in wanted}


def _at(text: str, sources: dict[str, str]) -> list[Mutant]:
    """``FILE``, ``FILE:LINE`` or ``FILE:FIRST-LAST``."""
    file, _, lines = text.partition(":")
    if file not in sources:
        raise SystemExit(f"not mutated: {file}; these are: {' '.join(sources)}")
    first, _, last = lines.partition("-")
    return every(sources, file, range(int(first or 1), int(last or first or 1 << 30) + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="mutate only these (default: all that count)")
    parser.add_argument("-n", "--number", type=int, default=NUMBER, help="how many mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="which ones (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="per cent killed (default: %(default)s)")
    parser.add_argument("--at", metavar="FILE[:LINES]", action="append", help="every mutant there instead")
    parser.add_argument("--quick", action="store_true", help="only the tests of these packages, not all unit tests")
    parser.add_argument("--list", action="store_true", help="say which mutants, and run nothing")
    options = parser.parse_args(arguments)
    sources, entries = _sources(options.files), explanations()
    if options.at:
        mutants = [mutant for text in options.at for mutant in _at(text, sources)]
    else:
        mutants = choose(sources, options.number, options.seed)
    if options.list:
        print(*mutants, sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tree = Tree()
    try:
        print(f"{len(mutants)} mutants, seed {options.seed}; the tests without one first", flush=True)
        if not tree.measure(thorough=not options.quick):
            print("the tests fail without a mutant", file=sys.stderr)
            return 2
        return _report(tree, mutants, entries, options)
    finally:
        tree.close()


def _report(tree: Tree, mutants: list[Mutant], entries: list[Explanation], options: argparse.Namespace) -> int:
    survivors: list[tuple[Mutant, Explanation | None]] = []
    for number, mutant in enumerate(mutants, start=1):
        known = explained(mutant, entries)
        killed = tree.kills(mutant, thorough=not options.quick and known is None)
        print(f"{number:4} {'killed  ' if killed else 'SURVIVED'} {mutant}", flush=True)
        if not killed:
            survivors.append((mutant, known))
        elif known:
            print(f"     tests/mutants.toml explains it all the same: {known.why}")
    for mutant, known in survivors:
        print(f"\n{mutant.diff}\n= {_reason(known)}")
    killed_count = len(mutants) - len(survivors)
    score = 100 * killed_count / len(mutants) if mutants else 100.0
    unexplained = sum(known is None for _, known in survivors)
    print(
        f"\n{killed_count} of {len(mutants)} mutants killed: {score:.1f} % (wanted: {options.threshold:g} %); "
        f"{len(survivors)} survived, {unexplained} of them unexplained"
    )
    return 1 if score < options.threshold or unexplained else 0


def _reason(known: Explanation | None) -> str:
    if known is None:
        return "unexplained: write a test that fails, or an entry in tests/mutants.toml"
    return f"{known.why}{f' ({known.test})' if known.test else ''}"


if __name__ == "__main__":
    sys.exit(main())
