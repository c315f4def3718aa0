"""One emulated host that runs a plan of tests: its thread, its events, and how it ended."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from kvmpass._dataclass import dataclass
from kvmpass.testing.artifacts import move_artifacts
from kvmpass.testing.events import Event, EventReader
from kvmpass.testing.profiles import LabLike, Profile
from kvmpass.testing.state import PLAN

if TYPE_CHECKING:
    from kvmpass.lab.config import LabResult

# Settings in a project's pytest configuration.
ENVIRONMENT = "kvmpass_environment"
SPARES = "kvmpass_spare_hosts"
ARTIFACTS = "artifacts"  # copies of the tests' files, in the directory of a session
TAIL_LINES = 60
Phase = Literal["setup", "call", "teardown"]
# pytest's own plugins that are used outside only: which tests failed last, or are new, is known there.
NOT_INSIDE = ("doctest", "lfplugin", "nfplugin", "pastebin", "stepwise")


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What identifies a host: tests with the same values share it."""

    profile: str
    """Name of the profile."""
    kernel: str
    """``stock``, ``full``, ``next`` or a path."""
    qemu: str
    """``system``, ``modern`` or a path."""
    part: str = ""
    """Which part of the tests it runs (``, part 1 of 2``), if they are divided."""

    def __str__(self) -> str:
        return f"{self.profile} ({self.kernel} kernel, {self.qemu} QEMU{self.part})"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a test has no report of its own."""

    text: str
    """The reason, for the report."""
    sections: tuple[tuple[str, str], ...] = ()
    """Title and content of output captured from the host."""
    phase: Phase = "setup"
    """The phase that the test was in."""

    @property
    def evidence(self) -> str:
        """The sections as one text."""
        return "\n\n".join(f"--- {title}\n{content}" for title, content in self.sections)


class LabSession:
    """An emulated host that runs tests: started by the constructor, read by :meth:`poll`, ended by :meth:`close`.

    Synchronization: main thread only. The lab runs in a thread of its own.
    """

    def __init__(
        self,
        config: pytest.Config,
        spec: HostSpec,
        profile: Profile,
        temporary: Path,
        slowdown: float,
        items: list[pytest.Item],
    ) -> None:
        """Write the plan and start the lab; returns at once. Raises ``LabError`` for an invalid profile.

        ``temporary`` is the base directory for the tests' temporary files, inside and, after the end, outside. Time
        limits are multiplied by ``slowdown``.
        """
        from kvmpass.lab.config import LabConfig

        self.collected: set[str] | None = None
        """Node IDs of the tests collected inside; ``None`` before that."""
        self.death: Failure | None = None
        """Why the host died; ``None`` if it did not."""
        self.finished = False
        """Whether the pytest inside has ended."""
        self._temporary = temporary
        self._directory = Path(tempfile.mkdtemp(prefix="kvmpass-test-"))
        self._directory.chmod(0o777)
        self._reader = EventReader(self._directory / "events.jsonl")
        self._forced = False
        self._died_in: str | None = None
        self._collect_errors: list[tuple[str, str]] = []
        self._result: LabResult | None = None
        self._error: BaseException | None = None
        self._started = time.monotonic()
        self._ended: float | None = None
        self._boot_seconds = 0.0
        self._tests = 0
        trace = self._directory / "iommu.trace" if "iommu" not in profile.without else None
        plan = {
            "ids": [item.nodeid for item in items],
            "events": str(self._directory / "events.jsonl"),
            "profile": spec.profile,
            "roles": dict(profile.roles),
            "trace": str(trace) if trace else None,
            "slowdown": slowdown,
            "temporary": str(temporary),
            "files": str(self._directory / ARTIFACTS),
        }
        (self._directory / "plan.json").write_text(json.dumps(plan))
        self._lab: LabLike = config.hook.pytest_kvmpass_lab(
            config=config,
            lab=LabConfig(
                devices=profile.devices,
                memory=profile.memory,
                cpus=profile.cpus,
                kernel=spec.kernel,
                qemu=spec.qemu,
                append=profile.append,
                without=profile.without,
                writable=(self._directory, *writable_directories(config, profile)),
                iommu_trace=trace,
                timeout=profile.timeout and profile.timeout * slowdown,
            ),
        )
        # Imports are slow inside, where the CPU is emulated: plugins are loaded by name only.
        environment = {
            PLAN: str(self._directory / "plan.json"),
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        passed = ("PYTHONPATH", "PYTHONWARNINGS", *config.getini(ENVIRONMENT))
        environment |= {name: os.environ[name] for name in passed if name in os.environ}
        command = inner_command(config, list(dict.fromkeys(str(item.path) for item in items)), temporary)
        arguments = (command, config.invocation_params.dir, environment)
        self._thread = threading.Thread(target=self._run, args=arguments, name="kvmpass-lab", daemon=True)
        self._thread.start()

    def _run(self, command: list[str], cwd: Path, environment: dict[str, str]) -> None:
        try:
            with (self._directory / "stdout").open("wb") as stdout, (self._directory / "stderr").open("wb") as stderr:
                self._result = self._lab.run(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr)
        except BaseException as error:  # reported by the main thread
            self._error = error
        finally:
            self._ended = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether the host still runs."""
        return self._thread.is_alive()

    def poll(self) -> list[Event]:
        """Return the events since the last call."""
        events = self._reader.poll()
        for event in events:
            if event["event"] == "collected":
                self.collected = set(event["ids"])
                self._collect_errors = [(node, text) for node, text in event["errors"]]
                self._boot_seconds = time.monotonic() - self._started
            elif event["event"] == "finish":
                self._tests += 1
            elif event["event"] == "end":
                self.finished = True
        return events

    def missing_reason(self, nodeid: str) -> str:
        """Return why a test of the plan was not collected inside."""
        for node, text in self._collect_errors:
            if nodeid == node or nodeid.startswith((f"{node}::", f"{node}/")):
                return f"could not be collected inside the emulated host:\n{text}"
        return "was not collected inside the emulated host: do its parameters depend on the host?"

    def cpu_time(self) -> float | None:
        """Return the seconds of CPU time that the emulator has used; ``None`` if unknown."""
        return self._lab.cpu_time()

    def end_dead(self, nodeid: str | None, reason: str) -> Failure:
        """End a host that died or does not respond (``reason``) during a test, and return what is known about it.

        ``nodeid`` is ``None`` before the first test.
        """
        hung = self.running and not self.finished
        self.stop()
        self._died_in = nodeid
        during = f"during {nodeid}" if nodeid else "before the first test"
        if self._error is not None:
            text = f"the emulated host failed {during}: {error_text(self._error)}"
        elif hung:
            text = f"the emulated host {reason} {during} and was ended"
        elif self._result is not None:
            text = f"the emulated host died {during}: {self._result.summary}"
        else:
            text = f"the emulated host died {during}"
        sections = []
        if self._result is not None and self._result.console_tail:
            sections.append(("console of the emulated host", self._result.console_tail))
        for name in ("stdout", "stderr"):
            file = self._directory / name
            content = file.read_text(errors="replace") if file.exists() else ""
            if content.strip():
                sections.append((f"{name} of the pytest inside", tail(content)))
        death = Failure(f"{text}\nIts files are kept in {self._directory}", tuple(sections))
        # Before the first test, the evidence is in the text, which the first test that did not run reports.
        self.death = death if nodeid else Failure(f"{death.text}\n{death.evidence}")
        return self.death

    def not_run_reason(self) -> str:
        """Return the text for the next test that did not run because the host died."""
        assert self.death is not None
        if self._died_in is None:
            self._died_in = "the boot"
            return self.death.text
        return f"not run: the emulated host died during {self._died_in}"

    def request_stop(self) -> None:
        """End the host, without waiting for it."""
        if self.running:
            self._forced = True
            self._lab.stop()

    def stop(self) -> None:
        """End the host, and wait for it."""
        self.request_stop()
        self._thread.join(30)

    def close(self) -> str:
        """End the host, move the tests' files to where they belong, and return a line about the host."""
        self.stop()
        move_artifacts(self._directory / ARTIFACTS, self._temporary)
        seconds = (self._ended or time.monotonic()) - self._started
        if self.death is None:
            shutil.rmtree(self._directory, ignore_errors=True)
        line = f"{self._tests} tests, {self._boot_seconds:.0f} s to the first, {seconds:.0f} s in all"
        if self._result is not None and self._result.woken:
            line += f", stalled and woken {self._result.woken} times"
        if self.death is not None:
            return f"{line}, DIED, files in {self._directory}"
        return f"{line}, ended early" if self._forced else line


def error_text(error: BaseException) -> str:
    """Return the class, the message and the hints of an exception."""
    hints = [f"\n  hint: {note}" for note in getattr(error, "__notes__", ())]
    return "".join([f"{type(error).__name__}: {error}", *hints])


def tail(text: str) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def writable_directories(config: pytest.Config, profile: Profile) -> list[Path]:
    """Return the directories that a host may write to: its profile's, created if missing, and pytest's cache."""
    found = [config.rootpath / name for name in profile.writable]
    for path in found:
        path.mkdir(parents=True, exist_ok=True)
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None:
        with suppress(OSError):  # then the cache does not work outside, either
            found.append(cache.mkdir("kvmpass").parents[1])
    return found


def temporary_directory(config: pytest.Config) -> Path:
    """Return the base directory for temporary files of this run."""
    factory = getattr(config, "_tmp_path_factory", None)  # absent with -p no:tmpdir
    return factory.getbasetemp() if factory is not None else Path(tempfile.mkdtemp(prefix="kvmpass-test-"))


def inner_command(config: pytest.Config, files: list[str], temporary: Path) -> list[str]:
    """Return the command for inside: the same rootdir and settings, without selection and reporting."""
    option = config.option
    command = [sys.executable, "-m", "pytest", "-p", "kvmpass.testing.plugin"]
    for plugin in (*NOT_INSIDE, *(["cacheprovider"] if getattr(config, "cache", None) is None else [])):
        command += ["-p", f"no:{plugin}"]
    command.append(f"--rootdir={config.rootpath}")
    if config.inipath is not None:
        command += ["-c", str(config.inipath)]
    for plugin in option.plugins:
        if not plugin.startswith("no:"):
            command += ["-p", plugin]
    for override in option.override_ini or ():
        command += ["-o", override]
    for warning in option.pythonwarnings or ():
        command += ["-W", warning]
    command += ["-o", "addopts=", f"--import-mode={option.importmode}", f"--tb={option.tbstyle}"]
    if option.showlocals:
        command.append("--showlocals")
    command += ["-v"] * max(0, option.verbose)
    command += ["--continue-on-collection-errors", "--color=no"]
    command.append(f"--basetemp={temporary}")
    return [*command, *files]
