"""Commands of a session, run by the guest's agent, which runs here."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, cast

import pytest
from support.agent import LocalAgent
from support.interrupts import interrupted

from kvmpass.errors import GuestDied, GuestError
from kvmpass.guest import Guest, extract, output
from kvmpass.initramfs import served
from kvmpass.initramfs.cpio import Node, newc
from kvmpass.initramfs.served import Entry
from kvmpass.machine import Machine
from kvmpass.session import Session, files, process, streams

CONSOLE = "the console\n"


@pytest.fixture
def local() -> Iterator[LocalAgent]:
    local = LocalAgent()
    yield local
    local.close()


@pytest.fixture
def session(local: LocalAgent) -> Iterator[Session]:
    ends = threading.Event()
    machine, guest = SimpleNamespace(devices=[]), SimpleNamespace(console=CONSOLE, follow=ends.wait)
    yield Session("local", cast(Machine, machine), cast(Guest, guest), local.agent)
    ends.set()


def test_output_errors_and_status_of_run(session: Session) -> None:
    result = session.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.returncode, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    assert session.run(["sh", "-c", "printf 'a\\r\\nb'"], text=True).stdout == "a\nb"
    assert session.run("true").args == "true"


@pytest.mark.parametrize("directory", ["/no/such directory", "/etc/passwd"])
def test_a_directory_that_the_guest_cannot_enter_is_replaced(
    session: Session, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "ROOT", "")  # chroot needs a privilege
    warnings: list[str] = []
    session.entry = Entry(directory)
    session.begin(20, warnings.append)
    assert (session.run("pwd").stdout, len(warnings)) == (b"/\n", 1)
    with pytest.raises(OSError, match=directory):
        session.run("pwd", cwd=directory)


def test_a_directory_that_the_guest_can_enter_stays(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "ROOT", "")
    warnings: list[str] = []
    session.entry = Entry(str(tmp_path))
    session.begin(20, warnings.append)
    assert (session.run("pwd").stdout.decode(), warnings) == (f"{tmp_path}\n", [])


def test_a_guest_powers_off_even_if_it_does_not_send_all_its_files(local: LocalAgent) -> None:
    """Its disks would lack what it has written."""
    done: list[str] = []
    ends = threading.Event()
    guest = SimpleNamespace(console=CONSOLE, sending_files=False)

    def power_off() -> None:
        done.append("power off")
        guest.sending_files = len(done) == 1
        if len(done) == 2:
            ends.set()

    guest.power_off, guest.follow, guest.result = power_off, lambda timeout: ends.wait(), lambda timeout: "result"
    machine = SimpleNamespace(devices=[], stop=lambda: done.append(f"stopped, powered off: {ends.is_set()}"))
    session = Session("local", cast(Machine, machine), cast(Guest, guest), local.agent)
    session.begin(20)
    result: object = session.stop(0.1)
    assert (result, done) == ("result", ["power off", "power off", "stopped, powered off: True"])


def test_exceptions_are_those_of_subprocess(session: Session) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        session.run(["sh", "-c", "echo out; exit 3"], check=True)
    assert (failed.value.returncode, failed.value.stdout) == (3, b"out\n")
    with pytest.raises(FileNotFoundError) as missing:
        session.run(["/no/such program"])
    assert missing.value.filename == "/no/such program"
    with pytest.raises(FileNotFoundError) as missing:
        session.run(["true"], cwd="/no/such directory")
    assert missing.value.filename == "/no/such directory"
    for seconds in (0.5, 5, 50):  # a busy machine may need more for the output
        with pytest.raises(subprocess.TimeoutExpired) as late:
            session.run(["sh", "-c", "echo begun; exec sleep 100"], timeout=seconds)
        if late.value.output:
            break
    assert late.value.output == b"begun\n"
    assert session.run(["sh", "-c", "kill -9 $$"]).returncode == -signal.SIGKILL


def test_streams_are_merged_dropped_or_inherited(
    session: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = ["sh", "-c", "echo out; echo err >&2"]
    in_turns = ["sh", "-c", "for n in 1 2 3 4 5; do echo out $n; echo err $n >&2; done"]
    merged = session.run(in_turns, stderr=subprocess.STDOUT)
    assert (merged.stdout, merged.stderr) == (b"".join(b"out %d\nerr %d\n" % (n, n) for n in range(1, 6)), None)
    dropped = session.run(script, stdout=subprocess.DEVNULL)
    assert (dropped.stdout, dropped.stderr) == (None, b"err\n")
    with (tmp_path / "file").open("wb") as file:
        session.run(script, stdout=file)
    assert (tmp_path / "file").read_bytes() == b"out\n"
    assert session.run(script, capture_output=False).stdout is None
    assert capfd.readouterr() == ("out\n", "err\n")


def test_a_megabyte_each_way(session: Session, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    assert session.run(["cat"], input=data).stdout == data
    (tmp_path / "data").write_bytes(data)
    with (
        (tmp_path / "data").open("rb") as source,
        (tmp_path / "copy").open("wb") as target,
        session.popen(["cat"], stdin=source, stdout=target) as process,
    ):
        pass
    assert (process.returncode, (tmp_path / "copy").read_bytes() == data) == (0, True)


def test_ten_threads_at_once(session: Session) -> None:
    def work(number: int) -> tuple[int, bytes]:
        result = session.run(["sh", "-c", f"cat; exit {number}"], input=b"%d" % number)
        return result.returncode, result.stdout

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(work, range(50))) == [(number, b"%d" % number) for number in range(50)]


def test_pipes_of_popen(session: Session) -> None:
    pipe = subprocess.PIPE
    with session.popen(["sh", "-c", "read it; echo got $it; cat >&2"], stdin=pipe, stdout=pipe, stderr=pipe) as it:
        assert it.stdin and it.stdout and it.stderr
        it.stdin.write(b"one\ntwo")
        it.stdin.flush()
        assert it.stdout.readline() == b"got one\n"
        it.stdin.close()
        assert it.stderr.read() == b"two"
    assert it.returncode == 0


def test_a_pipe_that_is_not_read_delays_nothing(session: Session) -> None:
    with session.popen(["sh", "-c", "head -c 3000000 /dev/zero"], stdout=subprocess.PIPE) as process:
        assert session.run("true").returncode == 0
    assert process.returncode == 0


def test_a_reader_that_goes_away_ends_a_command(session: Session) -> None:
    read, write = os.pipe()
    process = session.popen(["cat", "/dev/zero"], stdout=write)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.wait(20) == -signal.SIGPIPE


def test_output_that_cannot_be_written_is_an_error(session: Session) -> None:
    with Path("/dev/full").open("wb") as full:
        for script in ("echo out", "echo out; exec sleep 1000"):
            with pytest.raises(OSError, match="No space left on device"):
                session.run(["sh", "-c", script], stdout=full)
        process = session.popen(["cat", "/dev/zero"], stdout=full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device"):
                process.wait(20)
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.parametrize("target", [subprocess.PIPE, subprocess.DEVNULL, None])
def test_output_that_is_lost_is_an_error(
    session: Session, target: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever receiver has no memory left: the command is ended, and who waits for it does not wait for ever."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(streams.Capture, "__call__", fail)
    monkeypatch.setattr(process, "drop", fail)
    monkeypatch.setattr(output.Outlet, "_queue", fail)
    lost = pytest.raises(GuestError, match=r"some of the command's output is lost: MemoryError\(\)")
    with (tmp_path / "file").open("wb") as file, lost as caught:
        session.run(["sh", "-c", "echo word; exec sleep 1000"], stdout=file if target is None else target)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_reader_that_stalls_is_a_timeout_and_can_be_abandoned(session: Session) -> None:
    read, write = os.pipe()
    process = session.popen(["head", "-c", "200000", "/dev/zero"], stdout=write)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.abandon()
    assert process.poll() == 0
    os.close(read)
    os.close(write)


def test_a_terminal(session: Session) -> None:
    words = ["sh", "-c", "stty size; test -t 0 -a -t 2"]
    with session.popen(words, stdout=subprocess.PIPE, tty=(33, 101)) as process:
        assert process.stdout
        assert process.stdout.read().split() == [b"33", b"101"]
    assert process.returncode == 0


def test_too_much_output_ends_a_command(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_CAPTURED", 1 << 20)
    with pytest.raises(GuestError, match="has written more than"):
        session.run(["cat", "/dev/zero"])


def test_a_process_that_has_ended_keeps_nothing(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference cycle would keep what was captured until garbage is collected."""
    kept: list[weakref.ref[object]] = []

    class Capture(streams.Capture):
        def __init__(self) -> None:
            super().__init__()
            kept.append(weakref.ref(self))

    monkeypatch.setattr("kvmpass.session.session.Capture", Capture)
    words = ["sh", "-c", "echo word; echo word >&2"]
    gc.disable()
    try:
        with (tmp_path / "file").open("wb") as file:
            assert session.run(words).stdout == b"word\n"
            processes = [
                session.popen(words, stdout=file, stderr=file),
                session.popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
            ]
            kept += [weakref.ref(process) for process in processes]
            while processes:
                with processes.pop() as ended:
                    pass
                del ended
        until = time.monotonic() + 20
        while any(reference() for reference in kept) and time.monotonic() < until:
            time.sleep(0.01)  # the agent's thread may still hold the last frame's process
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()


def test_all_who_wait_learn_of_the_end(session: Session, local: LocalAgent) -> None:
    deaths: list[GuestDied] = []
    process = session.popen(["sleep", "100"], stdout=subprocess.PIPE)
    assert process.stdout

    def wait(what: object) -> None:
        with pytest.raises(GuestDied) as died:
            what()  # type: ignore[operator]
        deaths.append(died.value)

    waiting = [process.wait, process.stdout.read, lambda: session.run(["sleep", "100"])]
    threads = [threading.Thread(target=wait, args=[what]) for what in waiting]
    for thread in threads:
        thread.start()
    while len(local.agent._processes) < 2:
        time.sleep(0.01)
    local.agent.fail("the guest panicked")
    for thread in threads:
        thread.join(20)
    assert [(died.reason, died.console, died.events) for died in deaths] == [("the guest panicked", CONSOLE, ())] * 3
    with pytest.raises(GuestDied, match="panicked"):
        session.popen("true")


def test_files_in_and_out(session: Session, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_bytes(b"content")
    (source / "sub/file").chmod(0o750)
    session.copy_in(source, f"{tmp_path}/inside/")
    assert (tmp_path / "inside/source/sub/file").read_bytes() == b"content"
    session.copy_in(source / "sub/file", f"{tmp_path}/inside/other")
    assert (tmp_path / "inside/other").stat().st_mode & 0o777 == 0o750
    with pytest.raises(GuestError, match="was not copied into the guest"):
        session.copy_in(source, "/proc/here/")
    with pytest.raises(FileNotFoundError):
        session.copy_in(tmp_path / "missing", "/tmp/")


def test_of_symlinks_only_the_source_itself_is_followed(session: Session, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("tree")
    session.copy_in(tmp_path / "link", f"{tmp_path}/inside/copy")
    assert str((tmp_path / "inside/copy/dangling").readlink()) == "nowhere"


def test_files_that_are_not_in_the_guest(session: Session, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="not an absolute path"):
        session.copy_out("file", tmp_path)
    with pytest.raises(GuestError, match="was not copied to"):
        session.copy_out("/no/such file", tmp_path)


def in_time(call: Callable[[], object]) -> None:
    """Call it in a thread; it must return or raise within 20 seconds."""
    called: Future[object] = Future()

    def run() -> None:
        try:
            called.set_result(call())
        except BaseException as error:
            called.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    called.result(20)


def test_a_guest_with_more_errors_than_are_kept(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads on once they have been read: they are, although the archive is not written yet."""
    script = "echo first >&2; head -c 3000000 /dev/zero >&2; cat >/dev/null; exit 1"
    monkeypatch.setattr(files, "_UNPACK", script)
    (tmp_path / "data").write_bytes(bytes(3 << 20))
    with pytest.raises(GuestError, match=r"guest: first$"):
        in_time(lambda: session.copy_in(tmp_path / "data", "/tmp/"))


def test_a_copy_into_a_guest_that_stalls_can_fail(
    session: Session, local: LocalAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, name: str, file: IO[bytes]) -> None:
        local.program.send_signal(signal.SIGSTOP)
        file.write(b"unwritten")
        raise OSError("cannot be read")

    monkeypatch.setattr(files, "pack", fail)
    monkeypatch.setattr(process, "_KILL_SECONDS", 0.2)
    try:
        with pytest.raises(OSError, match="cannot be read"):
            in_time(lambda: session.copy_in(tmp_path, "/tmp/"))
    finally:
        local.program.send_signal(signal.SIGCONT)


@pytest.mark.usefixtures("usual_signals")
def test_a_copy_into_a_guest_that_stalls_can_be_interrupted(
    session: Session, local: LocalAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one Ctrl-C: what the archive has kept is not written at its end."""
    monkeypatch.setattr(files, "_UNPACK", "sleep 1000")
    monkeypatch.setattr(process, "_KILL_SECONDS", 0.2)
    (tmp_path / "data").write_bytes(bytes(3 << 20))
    with interrupted():
        session.copy_in(tmp_path / "data", "/tmp/")


def test_a_guest_that_sends_files_for_ever(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a limit is exceeded nothing more is read, and the command is killed."""
    monkeypatch.setattr(extract, "MAX_FILES", 2)
    nodes = [(name, Node(stat.S_IFDIR | 0o755)) for name in ("it", "it/a", "it/b", "it/c")]
    (tmp_path / "archive").write_bytes(newc(nodes))
    monkeypatch.setattr(files, "_PACK", f"cat {tmp_path}/archive; exec sleep 1000")
    with pytest.raises(GuestError, match="more than 2 files"):
        in_time(lambda: session.copy_out("/it", f"{tmp_path}/target/"))
    assert session._agent._processes == {}


def test_a_guest_is_asked_whether_it_answers(session: Session, local: LocalAgent) -> None:
    """At once: ``answering`` waits for half a minute of silence."""
    assert session.ping(20) < 20
    local.program.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError, match="does not answer within"):
            session.ping(0.1)
    finally:
        local.program.send_signal(signal.SIGCONT)
    local.agent.fail("the guest panicked")
    with pytest.raises(GuestDied, match="panicked") as died:
        session.ping(20)
    assert died.value.console == CONSOLE


def test_an_agent_that_has_ended_does_not_answer(session: Session, local: LocalAgent) -> None:
    """At once: its guest may run on, beside an init of the user's own."""
    assert session.answering
    local.agent.fail("the agent in the guest has ended")
    assert not session.answering
