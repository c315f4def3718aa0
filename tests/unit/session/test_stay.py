"""The process of a guest that stays, and its directory."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpass.cli.output import error_text
from kvmpass.events import DeviceEvent, DeviceReleased, DeviceRequest
from kvmpass.guest import GuestSpec
from kvmpass.host import Bdf
from kvmpass.session import stay as module
from kvmpass.session.client import Client, RequestFailed
from kvmpass.session.directory import GuestDirectory, GuestStatus, read
from kvmpass.session.stay import stay

FIRST, SECOND = "0000:01:00.0", "0000:01:00.1"


@pytest.fixture
def on_events() -> list[Callable[[DeviceEvent], None]]:
    """What is called with events of the guest's devices."""
    return []


@pytest.fixture
def session() -> SimpleNamespace:
    return SimpleNamespace(answering=True)


@pytest.fixture
def ends(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    on_events: list[Callable[[DeviceEvent], None]],
    session: SimpleNamespace,
) -> Iterator[list[str]]:
    """A guest that runs until it is stopped."""
    done: list[str] = []
    ended = threading.Event()

    def stop(seconds: float) -> str:
        done.append("stopped")
        return "stopped"

    @contextlib.contextmanager
    def opened(*arguments: Any, on_event: Callable[[DeviceEvent], None], **options: Any) -> Iterator[SimpleNamespace]:
        on_events.append(on_event)
        session.wait, session.stop = ended.wait, stop
        yield session
        done.append("rebound")

    monkeypatch.setenv("KVMPASS_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(module, "open_session", opened)
    yield done
    ended.set()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_guest_that_cannot_be_found_any_more_is_stopped(ends: list[str], tmp_path: Path, replaced: bool) -> None:
    """Its devices would stay bound. A new guest of its name keeps its directory as it is."""

    def removed(directory: Path) -> None:
        shutil.rmtree(directory)
        if replaced:
            directory.mkdir()
            (directory / "status.json").write_text("another's")

    result: Any = stay("one", [], GuestSpec(session=True), removed, lambda result: {})
    assert (result, ends) == ("stopped", ["stopped", "rebound"])
    assert [path.read_text() for path in tmp_path.glob("one/*")] == ["another's"] * replaced


def test_a_device_that_was_removed_is_no_longer_the_guests(
    ends: list[str], on_events: list[Callable[[DeviceEvent], None]]
) -> None:
    seen: list[tuple[str, ...]] = []

    def ready(directory: Path) -> None:
        [on_event] = on_events
        for event in (DeviceRequest(SECOND), DeviceReleased(SECOND, "guest"), DeviceReleased("fs0", "host")):
            on_event(event)
            seen.append(read(directory).devices)
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        stay("one", [Bdf.parse(FIRST), Bdf.parse(SECOND)], GuestSpec(session=True), ready, lambda result: {})
    assert seen == [(FIRST, SECOND), (FIRST,), (FIRST,)]


def test_a_guest_that_does_not_answer_is_shown_until_it_does(ends: list[str], session: SimpleNamespace) -> None:
    def ready(directory: Path) -> None:
        def watch() -> None:
            for answering, state in ((True, "running"), (False, "not answering"), (True, "running")):
                session.answering = answering
                deadline = time.monotonic() + 20
                while read(directory).state != state and time.monotonic() < deadline:
                    time.sleep(0.01)
                states.append(read(directory).state)
            shutil.rmtree(directory)  # ends it

        watching.append(threading.Thread(target=watch))
        watching[0].start()

    states: list[str] = []
    watching: list[threading.Thread] = []
    stay("one", [], GuestSpec(session=True), ready, lambda result: {})
    watching[0].join(20)
    assert states == ["running", "not answering", "running"]


def test_a_status_that_cannot_be_written_does_not_end_the_guest(
    ends: list[str],
    on_events: list[Callable[[DeviceEvent], None]],
    session: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is written once there is room again."""
    write, full, refused = GuestDirectory.write, threading.Event(), threading.Event()

    def limited(directory: GuestDirectory, status: GuestStatus) -> None:
        if full.is_set():
            refused.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory, status)

    def wait_for_state(directory: Path, state: str) -> None:
        deadline = time.monotonic() + 20
        while read(directory).state != state:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ready(directory: Path) -> None:
        def watch() -> None:
            try:
                full.set()
                session.answering = False
                on_events[0](DeviceReleased(FIRST, "guest"))
                assert refused.wait(20)
                time.sleep(0.2)  # some looks
                states.append(read(directory).state)
                full.clear()
                wait_for_state(directory, "not answering")
                states.append(",".join(read(directory).devices))
            finally:
                shutil.rmtree(directory)  # ends it

        watching.append(threading.Thread(target=watch))
        watching[0].start()

    monkeypatch.setattr(GuestDirectory, "write", limited)
    states: list[str] = []
    watching: list[threading.Thread] = []
    result: Any = stay("one", [Bdf.parse(FIRST)], GuestSpec(session=True), ready, lambda result: {})
    watching[0].join(20)
    assert (result, states) == ("stopped", ["running", ""])
    assert [record.getMessage() for record in caplog.records] == [
        "the status of the guest one cannot be written: [Errno 28] No space left on device"
    ]


def test_who_waits_learns_why_it_has_failed(ends: list[str]) -> None:
    answers: list[dict[str, Any]] = []

    def interrupted(directory: Path) -> None:
        def wait() -> None:
            with Client.connect("one") as client:
                client.request("wait")
                connected.set()
                with pytest.raises(RequestFailed) as failed:
                    client.answer(20)
                answers.append({"error": str(failed.value)})

        connected = threading.Event()
        waiting.append(threading.Thread(target=wait))
        waiting[0].start()
        assert connected.wait(20)
        raise SystemExit(143)

    waiting: list[threading.Thread] = []
    with pytest.raises(SystemExit):
        stay("one", [], GuestSpec(session=True), interrupted, lambda result: {}, reason=error_text)
    waiting[0].join(20)
    assert answers == [{"error": "the guest's process has failed: interrupted by SIGTERM"}]
