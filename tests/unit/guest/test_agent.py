"""The agent, the real program: what it runs, and what the host gets of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.agent import PROGRAM, LocalAgent
from support.repository import ROOT

from kvmpass.errors import GuestDied, GuestError, KvmpassError
from kvmpass.guest import agent as module
from kvmpass.guest import frames
from kvmpass.guest.agent import Agent
from kvmpass.guest.frames import ERRORS, OUTPUT
from kvmpass.guest.input import Input
from kvmpass.guest.process import WINDOW, AgentProcess
from kvmpass.initramfs import elf

SECONDS = 20
BEGIN = frames.encode(0, frames.HELLO, frames.NUMBERS.pack(frames.VERSION, 0)) + frames.encode(0, frames.READY)


@pytest.fixture
def local() -> Iterator[LocalAgent]:
    agent = LocalAgent()
    yield agent
    agent.close()


@pytest.fixture
def agent(local: LocalAgent) -> Agent:
    return local.agent


def read_all(process: AgentProcess, stream: int = OUTPUT) -> bytes:
    return b"".join(iter(lambda: process.read(stream, timeout=SECONDS), b""))


def shell(agent: Agent, script: str, **options: object) -> AgentProcess:
    return agent.start(["sh", "-c", script], **options)  # type: ignore[arg-type]


def test_a_command_takes_one_frame_there_and_few_back(local: LocalAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a notification and an interrupt, and wakes a thread."""
    there: list[bytes] = []
    back: list[frames.Frame] = []
    handle = local.agent._handle
    monkeypatch.setattr(local.agent, "send", lambda frame: [there.append(frame), local.send(frame)])
    monkeypatch.setattr(local.agent, "_handle", lambda frame: [back.append(frame), handle(frame)])
    local.agent.wait_ready(SECONDS)
    back.clear()
    assert local.agent.start(["true"]).wait(SECONDS) == 0
    kinds = sorted((frame.type, frame.stream) for frame in back)
    ends = [(frames.END, stream) for stream in (OUTPUT, ERRORS, frames.STATUS)]
    assert (len(there), kinds) == (1, [*ends, (frames.EXITED, 0)])


def test_what_cannot_be_run_is_said_at_once(agent: Agent) -> None:
    times = []
    for _ in range(10):
        started = time.monotonic()
        with pytest.raises(FileNotFoundError):
            agent.start(["no such"]).wait_started(SECONDS)
        times.append(time.monotonic() - started)
    assert min(times) < 0.3, "as long as it waits for what a process has left behind"


def test_it_is_a_small_static_program() -> None:
    data = PROGRAM.read_bytes()
    assert elf.is_elf(data)
    assert elf.dynamic(data).interpreter is None
    assert elf.dynamic(data).needed == ()
    assert len(data) < 16384


def test_both_sides_have_the_same_numbers() -> None:
    text = (ROOT / "cffi_build/agent/frames.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)", text, re.MULTILINE)}
    numbers |= {name: int(value) for name, value in re.findall(r"([A-Z_]+) = (\d+)", text)}
    del numbers["STREAMS"]
    stages = {name: numbers.pop(name) for name in ("SET_UP", "CHANGE_ROOT", "CHANGE_DIRECTORY", "EXECUTE")}
    assert [name.lower().replace("_", " ") for name in stages] == list(frames.STAGES)
    assert list(stages.values()) == list(range(len(frames.STAGES)))
    assert {name: getattr(frames, name) for name in numbers} == numbers
    assert len(numbers) > 20


def test_output_errors_and_status(agent: Agent) -> None:
    agent.wait_ready(SECONDS)
    assert agent.uptime is not None and agent.uptime > 0
    process = shell(agent, "echo out; echo err >&2; exit 7")
    process.wait_started(SECONDS)
    assert (read_all(process), read_all(process, ERRORS)) == (b"out\n", b"err\n")
    assert process.wait(SECONDS) == process.returncode == 7
    assert shell(agent, "read line || exit 3").wait(SECONDS) == 3, "an empty input"
    assert shell(agent, "kill -9 $$").wait(SECONDS) == -signal.SIGKILL


def test_errors_in_the_output_keep_their_order(agent: Agent) -> None:
    process = shell(agent, "for n in 1 2 3 4; do echo o$n; echo e$n >&2; done; exit 2", errors_in_output=True)
    assert read_all(process).split() == [b"o1", b"e1", b"o2", b"e2", b"o3", b"e3", b"o4", b"e4"]
    assert (process.wait(SECONDS), read_all(process, ERRORS)) == (2, b"")


def test_environment_directory_and_root(agent: Agent, tmp_path: Path) -> None:
    process = shell(agent, 'echo "$A $HOME"; pwd', environment={"A": "b c", "HOME": "/h"}, directory=str(tmp_path))
    assert read_all(process).decode() == f"b c /h\n{tmp_path}\n"
    process = agent.start(["ls"], directory="/nowhere")
    with pytest.raises(FileNotFoundError, match="change directory"):
        process.wait_started(SECONDS)
    process = agent.start(["ls"], root="/nowhere")
    with pytest.raises(OSError, match="change root"):
        process.wait_started(SECONDS)
    if os.geteuid() == 0:
        (tmp_path / "program").write_bytes(PROGRAM.read_bytes())
        (tmp_path / "program").chmod(0o755)
        process = agent.start(["/program"], root=str(tmp_path))
        process.wait_started(SECONDS)
        assert process.wait(SECONDS) == 1, "an agent without a port"


@pytest.mark.parametrize(
    "words, number",
    [
        (["no-such-program"], errno.ENOENT),
        (["/no/such/program"], errno.ENOENT),
        (["/etc/passwd"], errno.EACCES),
        (["/"], errno.EACCES),
        (["x" * 5000], errno.ENAMETOOLONG),
    ],
)
def test_a_program_that_cannot_be_run(agent: Agent, words: list[str], number: int) -> None:
    process = agent.start(words)
    with pytest.raises(OSError, match="execute") as failed:
        process.wait_started(SECONDS)
    assert failed.value.errno == number
    assert process.wait(SECONDS) == 127


def test_a_script_without_a_first_line(agent: Agent, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$# $2"\n')
    script.chmod(0o755)
    process = agent.start(["script", "a", "b"], environment={"PATH": f"/nowhere:{tmp_path}:/bin"})
    assert read_all(process) == b"2 b\n"


def test_a_megabyte_of_arguments_at_most(agent: Agent) -> None:
    words = ["x" * 100_000] * 9
    process = agent.start(["sh", "-c", 'echo $# "${#9}"', "sh", *words])
    assert read_all(process) == b"9 100000\n"
    with pytest.raises(GuestError, match="1048576"):
        agent.start(["true", *words, *words])
    with pytest.raises(KvmpassError, match="zero byte"):
        agent.start(["true", "a\0b"])
    for words in ([], [""]):
        with pytest.raises(KvmpassError, match="empty command"):
            agent.start(words)


def test_input_and_output_byte_for_byte(agent: Agent) -> None:
    """More than the windows, both ways at once."""
    content = os.urandom(5_000_001)
    source = Input()
    process = agent.start(["cat"], input=source)
    writer = threading.Thread(target=lambda: (source.send(content), source.end()))
    writer.start()
    assert read_all(process) == content
    writer.join()
    assert process.wait(SECONDS) == 0
    assert source.waiting == 0


@pytest.mark.parametrize("takes_pages", [True, False], ids=["pages", "copies"])
def test_output_comes_in_few_frames(takes_pages: bool) -> None:
    """As much as a pipe has room for in each, where the port takes pages."""
    local = LocalAgent(takes_pages=takes_pages)
    content = os.urandom(2_000_001)
    source = Input()
    source.send(content)
    source.end()
    process = local.agent.start(["dd", "bs=64k", "iflag=fullblock", "status=none"], input=source)
    assert read_all(process) == content
    assert process.wait(SECONDS) == 0
    received = frames.FrameReader().feed(bytes(local.received))
    sizes = [len(frame.payload) for frame in received if (frame.type, frame.stream) == (frames.DATA, OUTPUT)]
    assert max(sizes) == (frames.MAX_DATA if takes_pages else frames.MAX_PAYLOAD)
    assert local.agent.failure is None
    local.close()


PIECES = """
import fcntl, os, sys, time
while not os.path.exists("go"):
    time.sleep(0.01)
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
os.write(1, bytes(int(sys.argv[1])))
reader, writer = os.pipe()
for number in range(240):
    os.write(writer, bytes([number]) * 200)
    os.splice(reader, 1, 200)
open("done", "w")
"""


def test_output_in_more_buffers_than_one_frame_takes(local: LocalAgent, tmp_path: Path) -> None:
    """Of what a program splices nothing is joined: what can be moved of it is a frame all the same."""
    words = [sys.executable, "-S", "-E", "-c", PIECES, str(frames.MAX_PAYLOAD)]
    process = local.agent.start(words, directory=str(tmp_path))
    process.wait_started(SECONDS)
    os.kill(local.program.pid, signal.SIGSTOP)  # it would read them one by one
    (tmp_path / "go").touch()
    eventually((tmp_path / "done").exists)
    os.kill(local.program.pid, signal.SIGCONT)
    assert read_all(process) == bytes(frames.MAX_PAYLOAD) + b"".join(bytes([n]) * 200 for n in range(240))
    assert process.wait(SECONDS) == 0
    received = frames.FrameReader().feed(bytes(local.received))
    sizes = [len(frame.payload) for frame in received if (frame.type, frame.stream) == (frames.DATA, OUTPUT)]
    assert sizes[:3] == [frames.MAX_PAYLOAD, 31 * 200, 31 * 200], "beside the header"


TAKES_NO_PAGES = """
import ctypes, os, struct, sys
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
FILTER = [
    (LOAD, 0, 0, 0), (EQUAL, 0, 3, 275),  # splice
    (LOAD, 0, 0, 32), (EQUAL, 0, 1, 0),  # its third argument: to the port
    (RETURN, 0, 0, 0x00050000 | int(sys.argv.pop(1))), (RETURN, 0, 0, 0x7FFF0000),  # 0 or an error; or the call
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in FILTER))
libc = ctypes.CDLL(None, use_errno=True)
for words in ((38, 1, 0, 0, 0), (22, 2, struct.pack("HxxxxxxP", len(FILTER), ctypes.addressof(code)))):
    if libc.prctl(*words):
        sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_it_ends_once_the_port_has_lost_output() -> None:
    """Without room in its ring the driver drops the pages that it took of the pipe, and returns 0."""
    local = LocalAgent("-S", "-E", "-c", TAKES_NO_PAGES, "0", str(PROGRAM), program=Path(sys.executable))
    process = local.agent.start(["cat", "/dev/zero"])
    with pytest.raises(GuestDied, match="has ended"):
        process.wait(SECONDS)
    assert local.program.wait(SECONDS) == 1
    assert local.close() == 1


NUMBERED = "import sys; sys.stdout.write(''.join('%7d\\n' % number for number in range(100000)))"


def test_output_is_copied_where_the_driver_has_no_memory() -> None:
    """It allocates its buffer before it takes anything of the pipe."""
    words = ["-S", "-E", "-c", TAKES_NO_PAGES, str(errno.ENOMEM), str(PROGRAM)]
    local = LocalAgent(*words, program=Path(sys.executable))
    process = local.agent.start([sys.executable, "-S", "-E", "-c", NUMBERED])
    assert read_all(process) == b"".join(b"%7d\n" % number for number in range(100_000))
    assert process.wait(SECONDS) == 0
    local.close()


READER = """
import os
while os.read(0, 4096):
    pass
"""


def test_input_comes_in_few_frames(local: LocalAgent) -> None:
    """A reader that takes a page at a time costs no frame each way for each page."""
    source, content = Input(), bytes(1_000_000)
    process = local.agent.start([sys.executable, "-S", "-E", "-c", READER], input=source)
    process.wait_started(SECONDS)
    source.send(content)
    source.end()
    assert process.wait(SECONDS) == 0
    sent, received = (frames.FrameReader().feed(bytes(data)) for data in (local.sent, local.received))
    data = [len(frame.payload) for frame in sent if frame.type == frames.DATA]
    whole, rest = divmod(len(content), frames.MAX_PAYLOAD)
    assert data == [frames.MAX_PAYLOAD] * whole + [rest]
    assert len([frame for frame in received if frame.type == frames.CREDIT]) <= 2 * len(data)


def test_input_that_nobody_reads_is_dropped(agent: Agent) -> None:
    source = Input()
    process = shell(agent, "exec <&-; read -r line </dev/null; sleep 0.3; echo end", input=source)
    source.send(bytes(1_000_000))
    assert source.wait_below(1, SECONDS)
    assert read_all(process) == b"end\n"


def test_input_of_a_process_that_has_ended_is_dropped(agent: Agent) -> None:
    source = Input()
    assert agent.start(["true"], input=source).wait(SECONDS) == 0
    source.send(bytes(1_000_000))
    assert source.wait_below(1, SECONDS)


def test_a_process_may_end_before_its_start_has_returned() -> None:
    """Its input is dropped all the same."""

    def send(data: bytes) -> None:
        if data == frames.encode(1, frames.START, data[12:]):
            ends = [frames.encode(1, frames.END, stream=stream) for stream in (OUTPUT, ERRORS, frames.STATUS)]
            agent.feed(b"".join(ends) + frames.encode(1, frames.EXITED, frames.NUMBERS.pack(0, 3)))

    agent, source = Agent(send), Input()
    agent.feed(frames.encode(0, frames.HELLO, frames.NUMBERS.pack(frames.VERSION, 0)))
    source.send(bytes(1_000_000))
    assert agent.start(["true"], input=source).returncode == 3
    assert source.waiting == 0


def test_a_reader_that_stalls_stops_its_own_process_only(agent: Agent) -> None:
    stalled = shell(agent, "head -c 10000000 /dev/zero; echo end >&2")
    other = agent.start(["head", "-c", "5000000", "/dev/zero"])
    assert len(read_all(other)) == 5_000_000
    assert other.wait(SECONDS) == 0
    with pytest.raises(TimeoutError):
        stalled.wait(0.2)
    assert len(stalled._kept[OUTPUT]) == WINDOW
    assert len(read_all(stalled)) == 10_000_000
    assert read_all(stalled, ERRORS) == b"end\n"


def test_an_agent_that_stops_is_noticed_and_one_that_goes_on(
    local: LocalAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing starts meanwhile, and nothing is ended."""
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    agent = local.agent

    def look(answering: bool) -> None:
        deadline = time.monotonic() + SECONDS
        while agent.answering != answering and time.monotonic() < deadline:
            agent.look()
            time.sleep(0.05)
        assert agent.answering == answering

    agent.wait_ready(SECONDS)
    busy = shell(agent, "sleep 0.1; echo still here")
    busy.wait_started(SECONDS)
    os.kill(local.program.pid, signal.SIGSTOP)
    try:
        waiting = agent.start(["echo", "late"])
        looking = threading.Thread(target=look, args=[False])
        looking.start()
        with pytest.raises(GuestError, match="does not answer") as caught:
            waiting.wait_started(SECONDS)
        looking.join()
        [hint] = caught.value.__notes__
        assert hint.startswith("look at its console (kvmpass logs)")
        with pytest.raises(GuestError, match="said nothing for 30 seconds"):
            agent.start(["true"])
        assert agent.failure is None
    finally:
        os.kill(local.program.pid, signal.SIGCONT)
    look(True)
    assert (busy.wait(SECONDS), read_all(busy)) == (0, b"still here\n")
    assert (waiting.wait(SECONDS), agent._processes) == (0, {})


def test_a_silent_agent_gets_one_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    agent = Agent(lambda data: sent.append(data))
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)
    agent.look()
    assert sent == [], "it has not said that it is ready"
    agent.feed(BEGIN)
    for _ in range(3):
        agent.look()
    assert (sent, agent.answering) == ([frames.encode(0, frames.PING)], True), "it has time to answer"
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.0)
    for _ in range(3):
        agent.look()
    assert (len(sent), agent.answering) == (1, False)
    agent.feed(frames.encode(0, frames.PONG))
    assert agent.answering
    agent.look()
    assert (len(sent), agent.answering) == (2, True)
    monkeypatch.undo()
    agent.feed(frames.encode(0, frames.PONG))
    agent.look()
    assert len(sent) == 2, "it has said something just now"
    agent.power_off()
    assert sent[2:] == [frames.encode(0, frames.POWER_OFF)]


def test_an_agent_that_writes_and_does_not_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this side has to say to it would grow."""
    waiting = bytearray()

    def send(data: bytes) -> int:
        waiting.extend(data)
        return len(waiting)

    agent = Agent(send)
    agent.feed(BEGIN)
    process = agent.start(["yes"], receive=lambda process, stream, data: process.grant(stream, len(data)))
    monkeypatch.setattr(module, "_MAX_WAITING", 10_000)
    output = frames.encode(process.number, frames.DATA, bytes(frames.MAX_PAYLOAD), OUTPUT)
    for _ in range(10_000):
        agent.feed(output)
    assert agent.failure == "the guest's agent has violated its protocol: it does not read"
    assert len(waiting) < 11_000
    with pytest.raises(GuestDied):
        process.wait(0)


def test_many_at_once_and_no_more_than_that(agent: Agent) -> None:
    processes = [agent.start(["cat"], input=Input()) for _ in range(frames.MAX_PROCESSES - 1)]
    with pytest.raises(GuestError, match="64 processes"):
        agent.start(["true"])
    processes.append(agent.start(["cat"], input=Input(), last=True))
    with pytest.raises(GuestError, match="65 processes"):
        agent.start(["true"], last=True)
    for process in processes:
        process.wait_started(SECONDS)
        assert process.input is not None
        process.input.end()
    assert [process.wait(SECONDS) for process in processes] == [0] * len(processes)
    assert agent.start(["true"]).wait(SECONDS) == 0


def test_from_ten_threads(agent: Agent) -> None:
    def one(number: int) -> tuple[int, bytes]:
        content = os.urandom(100_000)
        source = Input()
        process = shell(agent, f"sha256sum; exit {number}", input=source)
        source.send(content)
        source.end()
        assert read_all(process).split()[0].decode() == hashlib.sha256(content).hexdigest()
        return process.wait(SECONDS), read_all(process, ERRORS)

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(one, range(50))) == [(number, b"") for number in range(50)]


def test_signals_go_to_the_process_group(agent: Agent) -> None:
    process = shell(agent, "sleep 1000 & echo $!; wait")
    child = int(process.read(timeout=SECONDS))
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == -signal.SIGTERM
    process.kill()
    eventually(lambda: not Path(f"/proc/{child}/exe").exists())
    for number in (0, 65, -1):
        with pytest.raises(ValueError, match="signal"):
            process.send_signal(number)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until(path: Path) -> str:
    """A shell's loop, which ends once ``path`` exists."""
    return f"until [ -e '{path}' ]; do sleep 0.01; done"


def test_what_a_process_leaves_behind_does_not_delay_its_end(agent: Agent, tmp_path: Path) -> None:
    """What it has written arrives; it lives on, and finds its pipe closed when it writes later."""
    written, go_on = tmp_path / "written", tmp_path / "go on"
    child = f"echo child; >'{written}'; {until(go_on)}; echo more"
    process = shell(agent, f"({child}) & {until(written)}; echo $!; exit 4")
    started = time.monotonic()
    said = read_all(process)
    assert (process.wait(SECONDS), said.split()[0], len(said.split())) == (4, b"child", 2)
    assert time.monotonic() - started > 0.2, "the time for what is still written"
    go_on.touch()
    eventually(lambda: not Path(f"/proc/{int(said.split()[1])}/exe").exists())


def test_what_it_leaves_behind_and_never_ends_to_write(agent: Agent, tmp_path: Path) -> None:
    """What is in the pipe then is the end, also where nobody has read it yet."""
    written = tmp_path / "written"
    process = shell(agent, f"(echo y; >'{written}'; exec yes) & {until(written)}; exit 0")
    eventually(lambda: process._exited is not None)
    time.sleep(0.8)
    assert set(read_all(process)[:-1].split(b"\n")) == {b"y"}
    assert process.wait(SECONDS) == 0


def test_what_it_leaves_behind_and_never_ends_to_write_in_bulk(agent: Agent) -> None:
    """It writes so much that its pages are spliced, and is read as fast."""
    process = shell(agent, "cat /dev/zero & sleep 0.2", receive=lambda it, stream, data: it.grant(stream, len(data)))
    assert process.wait(SECONDS) == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_what_it_leaves_behind_may_be_silent(agent: Agent, tmp_path: Path, terminal: bool) -> None:
    """It holds the pipe or terminal open, in which output is left at the time limit."""
    # A terminal may have no room for more: the kernel counts its buffers, which are not always full.
    sent, child = WINDOW + (2_000 if terminal else 10_000), tmp_path / "child"
    script = f"trap '' HUP; sleep 30 & echo $! >{child}; head -c {sent} /dev/zero"
    process = shell(agent, script, terminal=(24, 80) if terminal else None)
    eventually(lambda: process._exited is not None)
    eventually(lambda: len(process._kept[OUTPUT]) == WINDOW)
    time.sleep(0.5)
    assert len(process._kept[OUTPUT]) == WINDOW
    assert len(read_all(process)) == sent
    assert process.wait(SECONDS) == 0
    os.kill(int(child.read_text()), signal.SIGKILL)


def test_what_it_leaves_behind_and_never_ends_to_write_to_a_terminal(agent: Agent) -> None:
    process = shell(agent, "trap '' HUP; yes & exit 0", terminal=(24, 80))
    assert read_all(process)
    assert process.wait(SECONDS) == 0


def test_a_terminal(agent: Agent) -> None:
    source = Input()
    script = "stty size; trap 'stty size; exit 5' WINCH; tty >&2; while :; do sleep 0.05; done"
    process = shell(agent, script, input=source, terminal=(30, 90))
    said = b""
    while b"/dev/pts/" not in said:
        said += process.read(timeout=SECONDS)
    process.resize(31, 91)
    said += read_all(process)
    assert said.split()[:2] == [b"30", b"90"]
    assert said.split()[-2:] == [b"31", b"91"]
    assert process.wait(SECONDS) == 5


def test_all_of_the_output_of_a_terminal_reaches_a_reader_that_stalls(agent: Agent) -> None:
    """Once its process has ended, the rest is in the terminal's buffers, more than it says."""
    sent = WINDOW + 5_000
    process = agent.start(["head", "-c", str(sent), "/dev/zero"], terminal=(24, 80))
    eventually(lambda: len(process._kept[OUTPUT]) == WINDOW)
    eventually(lambda: process._exited is not None)
    time.sleep(0.5)
    assert len(read_all(process)) == sent
    assert process.wait(SECONDS) == 0


@pytest.mark.usefixtures("usual_signals")
def test_keys_of_a_terminal(agent: Agent) -> None:
    """What is typed is echoed; Ctrl-C is a signal for those in the foreground, Ctrl-D the end of what is read."""
    source = Input()
    script = "trap 'echo got it; got=it' INT; echo ready; until [ $got ]; do sleep 0.1; done; cat; echo $?"
    process = shell(agent, script, input=source, terminal=(24, 80))
    said = b""
    while b"ready" not in said:
        said += process.read(timeout=SECONDS)
    source.send(b"\x03")
    while b"got it\r\n" not in said:
        said += process.read(timeout=SECONDS)
    source.send(b"word\r\x04")
    assert read_all(process) == b"word\r\nword\r\n0\r\n"
    assert process.wait(SECONDS) == 0


def test_all_that_can_be_started_may_wait_for_the_guests_boot() -> None:
    waiting = bytearray()

    def send(data: bytes) -> int:
        waiting.extend(data)
        return len(waiting)

    agent = Agent(send)
    for number in range(frames.MAX_PROCESSES):
        agent.start(["a" * (frames.MAX_START - 100)], last=number == frames.MAX_PROCESSES - 1)
    assert agent.failure is None
    assert len(waiting) > 0.9 * frames.MAX_PROCESSES * frames.MAX_START


def test_how_long_the_guest_had_run_and_pings_at_once() -> None:
    numbers: list[int] = []

    def send(data: bytes) -> None:
        [frame] = frames.FrameReader().feed(data)
        numbers.append(frame.process)
        if len(numbers) == 1:
            with pytest.raises(TimeoutError, match="does not answer within 0 seconds"):
                agent.ping(0)
            agent.feed(frames.encode(numbers[0], frames.PONG))

    agent = Agent(send)
    agent.feed(frames.encode(0, frames.HELLO, frames.NUMBERS.pack(frames.VERSION, 2500)))
    assert (agent.uptime, agent.ready) == (2.5, False)
    agent.ping(0)
    assert len(set(numbers)) == 2
    assert agent._pings == {}


def test_it_answers(agent: Agent) -> None:
    assert agent.ping(SECONDS) < SECONDS
    assert agent._pings == {}


def test_failures_are_reported_first() -> None:
    local = LocalAgent("module x did not load: y", "z")
    local.agent.wait_ready(SECONDS)
    assert local.failures == ["module x did not load: y", "z"]
    local.agent.power_off()
    assert local.program.wait(SECONDS) == 0, "its guest would have powered off"
    local.close()


def test_an_unusable_guest_reports_and_ends() -> None:
    local = LocalAgent("-", "no room")
    assert local.program.wait(SECONDS) == 1
    with pytest.raises(GuestDied):
        local.agent.wait_ready(SECONDS)
    assert local.failures == ["no room"]
    local.close()


def test_all_who_wait_notice_its_end(local: LocalAgent) -> None:
    agent, source = local.agent, Input()
    process = agent.start(["sleep", "1000"], input=source)
    process.wait_started(SECONDS)
    source.send(bytes(1_000_000))
    local.program.kill()
    for call in (process.wait, process.read, lambda: agent.ping(SECONDS), lambda: agent.start(["true"])):
        with pytest.raises(GuestDied, match="has ended"):
            call()
    assert source.wait_below(1, 0)


def test_it_ends_rather_than_believe_a_host_that_sends_rubbish() -> None:
    for rubbish in (
        b"\xff" * 12,
        frames.encode(1, frames.START, frames.START_HEAD.pack(0, 0, 0, 0, 1, 0) + b"\0\0a\0"),
    ):
        local = LocalAgent()
        local.send(rubbish)
        if rubbish[0] != 0xFF:
            local.send(frames.encode(1, frames.DATA, bytes(10)))  # without an input: ignored
            assert local.agent.ping(SECONDS) < SECONDS
            local.send(b"\xff" * 12)
        assert local.program.wait(SECONDS) == 1
        local.close()


def test_its_descriptors_are_not_inherited(agent: Agent) -> None:
    others = [agent.start(["cat"], input=Input()) for _ in range(3)]
    for process in others:
        process.wait_started(SECONDS)
    process = agent.start(["ls", "/proc/self/fd"])
    assert read_all(process).split() == [b"0", b"1", b"2", b"3"]  # the last is ls's own
    for process in others:
        process.kill()
