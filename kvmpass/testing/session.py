"""One lab that runs one plan: a thread that boots it, the events that come out, and how it ended."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from kvmpass.testing.events import Event, Reader
from kvmpass.testing.profiles import LabLike, Profile
from kvmpass.testing.returning import receive
from kvmpass.testing.state import PLAN

if TYPE_CHECKING:
    from kvmpass.lab.config import LabResult

# Settings in a project's pytest configuration.
ENVIRONMENT = "kvmpass_environment"
SPARES = "kvmpass_spare_hosts"
FILES = "files"  # what tests leave, in the directory of a session
TAIL_LINES = 60
Phase = Literal["setup", "call", "teardown"]
# pytest's own plugins that are of use outside only; what was last failed, or new, is known there.
NOT_INSIDE = ("doctest", "lfplugin", "nfplugin", "pastebin", "stepwise")


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One emulated host: tests that agree on it share it, or each ``part`` of them has a host of its own."""

    profile: str
    kernel: str
    qemu: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.profile} ({self.kernel} kernel, {self.qemu} QEMU{self.part})"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a test could not speak for itself, and the phase (``setup``, ``call``, ``teardown``) that it was in."""

    text: str
    sections: tuple[tuple[str, str], ...] = ()
    phase: Phase = "setup"

    @property
    def evidence(self) -> str:
        """The sections as one text."""
        return "\n\n".join(f"--- {title}\n{content}" for title, content in self.sections)


class LabSession:
    """One emulated host that runs tests: made by :meth:`boot`, read by :meth:`poll`, ended by :meth:`close`.

    Synchronization: for the main thread only; the host itself is run by a thread of its own.
    """

    def __init__(self, lab: LabLike, directory: Path, temporary: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.temporary = temporary
        self.collected: set[str] | None = None
        self.death: Failure | None = None
        self.finished = False
        """Whether the pytest inside has said that it is over."""
        self._forced = False
        self._victim: str | None = None
        self._collect_errors: list[tuple[str, str]] = []
        self._reader = Reader(directory / "events.jsonl")
        self._result: LabResult | None = None
        self._error: BaseException | None = None
        self._started = time.monotonic()
        self._ended: float | None = None
        self._boot_seconds = 0.0
        self._tests = 0
        self._thread: threading.Thread | None = None

    @classmethod
    def boot(
        cls,
        config: pytest.Config,
        spec: HostSpec,
        profile: Profile,
        temporary: Path,
        slowdown: float,
        items: list[pytest.Item],
    ) -> LabSession:
        """Write the plan down and start the lab; returns at once. Raises ``LabError`` for what no lab can be.

        Temporary files of the tests are below ``temporary``, inside as well as, afterwards, outside. Time limits are
        stretched by ``slowdown``.
        """
        from kvmpass.lab.config import LabConfig

        directory = Path(tempfile.mkdtemp(prefix="kvmpass-test-"))
        directory.chmod(0o777)
        trace = directory / "iommu.trace" if "iommu" not in profile.without else None
        content = {
            "ids": [item.nodeid for item in items],
            "events": str(directory / "events.jsonl"),
            "profile": spec.profile,
            "roles": dict(profile.roles),
            "trace": str(trace) if trace else None,
            "slowdown": slowdown,
            "temporary": str(temporary),
            "files": str(directory / FILES),
        }
        (directory / "plan.json").write_text(json.dumps(content))
        lab = config.hook.pytest_kvmpass_lab(
            config=config,
            lab=LabConfig(
                devices=profile.devices,
                memory=profile.memory,
                cpus=profile.cpus,
                kernel=spec.kernel,
                qemu=spec.qemu,
                append=profile.append,
                without=profile.without,
                writable=(directory, *shared(config, profile)),
                iommu_trace=trace,
                timeout=profile.timeout and profile.timeout * slowdown,
            ),
        )
        session = cls(lab, directory, temporary)
        files = list(dict.fromkeys(str(item.path) for item in items))
        command = inner_command(config, files, temporary)
        session._start(command, config.invocation_params.dir, config.getini(ENVIRONMENT))
        return session

    def _start(self, command: list[str], cwd: Path, variables: list[str]) -> None:
        # Every import costs inside, where the CPU is emulated: plugins come by name only.
        environment = {
            PLAN: str(self.directory / "plan.json"),
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        for name in ("PYTHONPATH", "PYTHONWARNINGS", *variables):
            if name in os.environ:
                environment[name] = os.environ[name]

        def run() -> None:
            try:
                with (
                    (self.directory / "stdout").open("wb") as stdout,
                    (self.directory / "stderr").open("wb") as stderr,
                ):
                    self._result = self.lab.run(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr)
            except BaseException as error:  # told by the main thread
                self._error = error
            finally:
                self._ended = time.monotonic()

        self._thread = threading.Thread(target=run, name="kvmpass-lab", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the host is still there."""
        return self._thread is not None and self._thread.is_alive()

    # --- events

    def poll(self) -> list[Event]:
        """The events that are new since the last call."""
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

    def why_missing(self, nodeid: str) -> str:
        """Why a test of the plan is not among the collected ones."""
        for node, text in self._collect_errors:
            if nodeid == node or nodeid.startswith((f"{node}::", f"{node}/")):
                return f"could not be collected inside the emulated host:\n{text}"
        return "is not there inside the emulated host: do its parameters depend on the host?"

    def cpu_time(self) -> float | None:
        """Seconds of CPU time that the emulator has used; ``None`` if unknown."""
        return self.lab.cpu_time()

    # --- the end

    def died(self, victim: str | None, reason: str) -> Failure:
        """The lab is gone, or no longer responds (``reason``): end it and describe what is known."""
        hung = self.running and not self.finished
        self.stop()
        self._victim = victim
        during = f"during {victim}" if victim else "before the first test"
        if self._error is not None:
            text = f"the emulated host failed {during}: {type(self._error).__name__}: {self._error}"
            text += "".join(f"\n  hint: {note}" for note in getattr(self._error, "__notes__", ()))
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
            file = self.directory / name
            content = file.read_text(errors="replace") if file.exists() else ""
            if content.strip():
                sections.append((f"{name} of the pytest inside", tail(content)))
        death = Failure(f"{text}\nIts files are kept in {self.directory}", tuple(sections))
        # Without a test that ran the first one that did not carries the evidence, in its text.
        self.death = death if victim else Failure(f"{death.text}\n{death.evidence}")
        return self.death

    def not_run(self) -> str:
        """The text for a test that the death of the lab kept from running."""
        assert self.death is not None
        if self._victim is None:
            text, self._victim = self.death.text, "the boot"
            return text
        return f"not run: the emulated host died in {self._victim}"

    def order_end(self) -> None:
        """Have the host end now, if it is still there."""
        if self.running:
            self._forced = True
            self.lab.stop()

    def stop(self) -> None:
        """End the host now, and wait for it."""
        self.order_end()
        if self._thread is not None:
            self._thread.join(30)

    def close(self) -> str:
        """End the host, by force if it still runs; returns a line about it."""
        self.stop()
        receive(self.directory / FILES, self.temporary)
        seconds = (self._ended or time.monotonic()) - self._started
        if self.death is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        line = f"{self._tests} tests, {self._boot_seconds:.0f} s to the first, {seconds:.0f} s in all"
        if self._result is not None and self._result.woken:
            line += f", stalled and woken {self._result.woken} times"
        if self.death is not None:
            return f"{line}, DIED, files in {self.directory}"
        return f"{line}, ended early" if self._forced else line


def tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def shared(config: pytest.Config, profile: Profile) -> list[Path]:
    """Directories that a host may write to: those of its profile, made where they are missing, and pytest's cache."""
    found = [config.rootpath / name for name in profile.writable]
    for path in found:
        path.mkdir(parents=True, exist_ok=True)
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    if cache is not None:
        with suppress(OSError):  # nothing can be kept there, outside as well
            found.append(cache.mkdir("kvmpass").parents[1])
    return found


def temporary_directory(config: pytest.Config) -> Path:
    """Where this run's temporary files are."""
    factory = getattr(config, "_tmp_path_factory", None)  # absent with -p no:tmpdir
    return factory.getbasetemp() if factory is not None else Path(tempfile.mkdtemp(prefix="kvmpass-test-"))


def inner_command(config: pytest.Config, files: list[str], temporary: Path) -> list[str]:
    """The command for inside: the same rootdir and settings; selection and reporting stay outside."""
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
