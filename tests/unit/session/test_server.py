"""Requests to the process of a guest, whose agent runs here."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.agent import LocalAgent
from support.interrupts import interrupted

from kvmpass.cli import cp
from kvmpass.errors import GuestError
from kvmpass.guest import Guest
from kvmpass.machine import Machine
from kvmpass.session import Session, console, messages, process
from kvmpass.session.client import Client, RequestFailed, _connect
from kvmpass.session.console import Console
from kvmpass.session.directory import CONSOLE, GuestDirectory
from kvmpass.session.process import GuestProcess
from kvmpass.session.server import Server


class Stage:
    def __init__(self, server: Server, directory: Path, local: LocalAgent) -> None:
        self.server, self.directory, self.local = server, directory, local

    def run(self, *args: str, **more: Any) -> tuple[int, bytes]:
        """The status and the output of a command."""
        read, write = os.pipe()
        with Client.connect("one") as client, os.fdopen(read, "rb") as output:
            client.request("exec", [write, write], args=args, **more)
            os.close(write)
            text = output.read()
            return client.answer(20)["status"], text


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("KVMPASS_RUNTIME_DIR", str(tmp_path / ("long" * 30)))
    local = LocalAgent()
    machine, guest = SimpleNamespace(devices=[]), SimpleNamespace(console="")
    session = Session("one", cast(Machine, machine), cast(Guest, guest), local.agent)
    session.wait = lambda timeout=None: threading.Event().wait(timeout)  # type: ignore[method-assign]
    with GuestDirectory.claim("one") as directory, contextlib.closing(Console(directory.path)) as console:
        console.session = session
        server = Server(session, directory.path, console)
        yield Stage(server, directory.path, local)
        server.finish(status=0, outcome="the guest was stopped")
    local.close()


def test_a_command(stage: Stage) -> None:
    assert stage.run("sh", "-c", "echo $A; pwd; exit 3", env={"A": "b"}, cwd="/tmp") == (3, b"b\n/tmp\n")
    assert stage.run("sh", "-c", "kill -9 $$")[0] == -9


def test_errors_that_go_where_the_output_goes_keep_their_order(stage: Stage) -> None:
    script = "for n in 1 2 3 4 5; do echo out $n; echo err $n >&2; done"
    assert stage.run("sh", "-c", script) == (0, b"".join(b"out %d\nerr %d\n" % (n, n) for n in range(1, 6)))


def test_what_cannot_be_run(stage: Stage) -> None:
    with pytest.raises(RequestFailed, match="no such: No such file or directory") as failed:
        stage.run("no such")
    assert failed.value.exit_status == 127
    for args in ([], [""], ["a\0"]):
        with pytest.raises(RequestFailed) as failed:
            stage.run(*args)
        assert failed.value.exit_status == 125


def test_output_that_cannot_be_written(stage: Stage) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with Client.connect("one") as client:
        client.request("exec", [full, full], args=["echo", "out"])
        os.close(full)
        with pytest.raises(RequestFailed, match="output cannot be written: No space left on device") as failed:
            client.answer(20)
    assert failed.value.exit_status == 125


def test_what_comes_too_late_does_not_lose_the_answer(stage: Stage) -> None:
    """A closed socket with messages in it resets its peer, which then reads no answer."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(100):
        with Client.connect("one") as client:
            client.request("exec", [null, null], args=["no such" if number % 2 else "true"])
            for size in range(number % 7):
                client.notify(size=[size, size])
            try:
                assert client.answer(20) == {"status": 0}
            except RequestFailed as failed:
                assert (failed.exit_status, number % 2) == (127, 1), failed
    os.close(null)


def test_a_guest_that_stalls_has_not_ended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_START_SECONDS", 0.2)
    stage.local.program.send_signal(signal.SIGSTOP)
    with pytest.raises(RequestFailed, match=r"a command was not started within 0\.2 seconds") as failed:
        stage.run("true")
    assert failed.value.exit_status == 125
    stage.local.program.send_signal(signal.SIGCONT)
    assert stage.run("true") == (0, b"")


def test_a_console_of_another_init_gets_no_shell(stage: Stage) -> None:
    stage.server._session.own_init = True
    read, write = os.pipe()
    with (
        os.fdopen(read, "rb", buffering=0) as shown,
        os.fdopen(write, "wb"),
        Path("/dev/null").open("rb") as keys,
        stage.server._console.attached(keys.fileno(), write),
    ):
        stage.server._console(b"a prompt of its own")
        assert shown.read(100) == b"a prompt of its own"
        assert not stage.local.agent._processes


def test_a_console_of_a_guest_that_stalls(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays attached: the guest's kernel may still print, and take keys."""
    monkeypatch.setattr(GuestProcess, "_wait_started", lambda *_: None)
    monkeypatch.setattr(console, "_RESIZE_SECONDS", 0.2)
    monkeypatch.setattr(process, "_KILL_SECONDS", 0.2)
    monkeypatch.setattr(console, "_SHELL", "exec sleep 1000")
    typed = bytearray()
    monkeypatch.setattr(stage.server._session, "send_keys", lambda data: typed.extend(data) or 0)
    abandoned: list[GuestProcess] = []
    abandon = GuestProcess.abandon
    monkeypatch.setattr(GuestProcess, "abandon", lambda process: [abandoned.append(process), abandon(process)])
    before = len(stage.local.agent._processes)
    read, write = os.pipe()
    with Client.connect("one") as client:
        client.request("console", [read, write])
        while len(stage.local.agent._processes) == before:
            time.sleep(0.01)
        stage.local.program.send_signal(signal.SIGSTOP)
        client.notify(size=[24, 80])
        wait_until(lambda: bool(abandoned))
        stage.local.agent.answering = False
        client.notify(size=[25, 80])
        os.write(write, b"\x0f")  # what is shown there is typed here: one pipe
        wait_until(lambda: typed == b"\x0f")
        client.leave()
        assert client.answer(20) == {}
    assert [process.args[0] for process in abandoned] == ["stty"]  # type: ignore[index]
    stage.server._console._shell = None
    with Client.connect("one") as client:  # it cannot have a shell now
        client.request("console", [read, write])
        os.write(write, b"\x10")
        wait_until(lambda: typed == b"\x0f\x10")
        stage.local.agent.fail("the guest panicked")
        client.notify(size=[24, 80])
        with pytest.raises(RequestFailed, match="the guest panicked"):
            client.answer(20)
    stage.local.program.send_signal(signal.SIGCONT)
    os.close(read)
    os.close(write)


def test_signals_reach_the_command(stage: Stage) -> None:
    read, write = os.pipe()
    with Client.connect("one") as client, os.fdopen(read, "rb") as output:
        script = "trap 'exit 5' USR1; echo on; while :; do sleep 0.1; done"
        client.request("exec", [write, write], args=["sh", "-c", script])
        os.close(write)
        assert output.readline() == b"on\n"
        client.notify(signal=10)
        assert client.answer(20) == {"status": 5}


def test_the_clients_end_kills_its_command(stage: Stage) -> None:
    read, write = os.pipe()
    with Client.connect("one") as client, os.fdopen(read, "rb") as output:
        client.request("exec", [write, write], args=["sh", "-c", "echo on; exec sleep 1000"])
        os.close(write)
        assert output.readline() == b"on\n"
        client.leave()
        assert output.read() == b""


def test_a_reader_that_stalls_is_left_when_its_client_leaves(stage: Stage) -> None:
    before = threading.active_count()
    read, write = os.pipe()
    with Client.connect("one") as client:
        client.request("exec", [write, write], args=["cat", "/dev/zero"])
        os.read(read, 1)
    deadline = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)
    os.close(read)
    os.close(write)


def test_those_who_wait_learn_of_the_end(stage: Stage) -> None:
    with Client.connect("one") as waiting, Client.connect("one") as stopping:
        waiting.request("wait")
        stopping.request("stop", timeout=3)
        stage.server.wait()
        assert stage.server.stop_seconds == 3
        stage.server.finish(status=126, outcome="the guest panicked")
        for client in (waiting, stopping):
            assert client.answer(20) == {"status": 126, "outcome": "the guest panicked"}


def test_a_command_during_the_guests_end(stage: Stage) -> None:
    with Client.connect("one") as client:
        null = os.open("/dev/null", os.O_RDWR)
        client.request("exec", [null, null], args=["sleep", "1000"])
        os.close(null)
        while not stage.local.agent._processes:
            time.sleep(0.01)
        stage.local.agent.fail("the guest panicked")
        with pytest.raises(RequestFailed, match="the guest panicked") as failed:
            client.answer(20)
        assert failed.value.exit_status == 126


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nonsense_is_refused_and_leaves_nothing(stage: Stage) -> None:
    """Whatever comes: no descriptor is left, and the next request is served."""
    source = random.Random(1)
    stage.run("true")
    before = len([*Path("/proc/self/fd").iterdir()])
    requests = [b"", b"{", b"[]", b"\xff", b"[" * 50000, b'{"do": "exec"}', b'{"do": "exec", "args": 3}']
    requests += [
        b'{"do": "stop", "timeout": "x"}',
        b'{"do": "console"}',
        b'{"do": []}',
        b'{"do": "pack", "path": "a"}',
    ]
    requests += [source.randbytes(source.randrange(1, 200)) for _ in range(40)]
    for data in requests:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            _connect(connection, stage.directory)
            socket.send_fds(connection, [data], [0] * source.randrange(4))
            connection.settimeout(20)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while connection.recv(1 << 16):
                    pass
    assert stage.run("true") == (0, b"")
    wait_until(lambda: len([*Path("/proc/self/fd").iterdir()]) <= before)


@pytest.mark.parametrize(
    "do, name",
    [("exec", "request"), ("exec", "signals"), ("exec", "input"), ("exec", "output"), ("console", "output")],
)
def test_a_host_without_another_thread(stage: Stage, monkeypatch: pytest.MonkeyPatch, do: str, name: str) -> None:
    """One request fails, and says so; nothing of it is left, and the next one is served."""
    stage.run("true")
    wait_until(lambda: not stage.server._threads)
    before = len([*Path("/proc/self/fd").iterdir()])
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    null = os.open(os.devnull, os.O_RDWR)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with Client.connect("one") as client, pytest.raises(RequestFailed, match="can't start new thread") as failed:
            client.request(do, [null, null, null] if do == "exec" else [null, null], args=["sleep", "1000"])
            client.answer(20)
    assert failed.value.exit_status == 125
    os.close(null)
    assert stage.run("true") == (0, b"")
    wait_until(lambda: not stage.local.agent._processes)
    wait_until(lambda: len([*Path("/proc/self/fd").iterdir()]) <= before)


def test_a_guest_that_starts_nothing_delays_no_output_of_its_console(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is told, and the console's log goes on."""
    session, over = stage.server._session, threading.Event()
    console = stage.server._console

    def outside(args: list[str]) -> None:
        console(b"printed meanwhile\n")
        over.set()
        raise subprocess.TimeoutExpired(args, 60)

    monkeypatch.setattr(session, "outside", outside)
    with Client.connect("one") as client:
        client.request("console", [0, 1])
        with pytest.raises(RequestFailed, match="timed out after 60 seconds") as failed:
            client.answer(20)
    assert (failed.value.exit_status, over.is_set()) == (125, True)
    assert (stage.directory / CONSOLE).read_bytes() == b"printed meanwhile\n"


def test_a_message_that_is_too_large(stage: Stage) -> None:
    with Client.connect("one") as client, pytest.raises(Exception, match="the command is too long"):
        client.request("exec", [1, 2], args=["x" * messages.MAX_MESSAGE])


def test_a_request_to_a_guest_that_has_ended() -> None:
    """``kvmpass stop --all`` goes on with the next one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.close()
        with pytest.raises(RequestFailed, match="the process of the guest one has ended") as failed:
            Client("one", ours).request("stop", timeout=1)
    assert failed.value.exit_status == 126


def test_a_copy_that_the_process_refuses_has_its_reason(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(RequestFailed, match="'relative' is not an absolute path of the guest"):
        cp._copy_out("one", "relative", str(tmp_path))
    stage.local.agent.fail("the guest panicked")
    with pytest.raises(RequestFailed, match="the guest panicked"):
        cp._copy_out("one", "/etc/passwd", str(tmp_path))


def test_a_copy_that_fails_here_has_that_reason(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="was not copied to"):
        cp._copy_out("one", "/no/such file", str(tmp_path))


@pytest.mark.usefixtures("usual_signals")
def test_a_copy_into_a_guest_that_stalls_can_be_interrupted(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(3 << 20))
    stage.local.program.send_signal(signal.SIGSTOP)
    try:
        with interrupted():
            cp._copy_in(tmp_path / "data", "one", "/tmp/")
    finally:
        stage.local.program.send_signal(signal.SIGCONT)


def test_a_message_with_more_descriptors_than_fit() -> None:
    """The one that fits is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        messages.send(theirs, {}, [ours.fileno()] * 2)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        try:
            with pytest.raises(messages.BadMessage, match="more descriptors than this process can have"):
                messages.receive(ours)
            assert os.dup(0) == free
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(free)


def test_descriptors_of_a_message_are_not_inherited() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        messages.send(theirs, {}, [ours.fileno()])
        received = messages.receive(ours)
    assert received is not None
    (fd,) = received[1]
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
