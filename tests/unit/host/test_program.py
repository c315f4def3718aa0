"""A program of the host with borrowed devices; the host is made up, the program real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.host_tree import Host

from kvmpass.errors import BadAddress, HostNotReady, NotAssignable, ProgramError
from kvmpass.host import Bdf, program
from kvmpass.host.drivers import transaction
from kvmpass.host.program import Placeholders, run_program

DISK, NIC, SOUND = "0000:01:00.0", "0000:02:00.0", "0000:02:00.1"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """With iommufd; two of the devices are in one group."""
    monkeypatch.setattr(transaction, "NODE_TIMEOUT", 0.02)
    made = Host(tmp_path / "host")
    devices = ((DISK, "nvme", 7, 0x010802), (NIC, "e1000e", 8, 0x040300), (SOUND, "snd", 8, 0x040300))
    for number, (bdf, driver, group, kind) in enumerate(devices):
        made.add(bdf, driver, group, kind)
        made.put(f"sys/bus/pci/devices/{bdf}/vfio-dev/vfio{number}/dev", f"511:{number}")
        made.put(f"dev/vfio/devices/vfio{number}", "")
    made.put("proc/devices", "Character devices:\n511 vfio-dev")
    made.put("dev/iommu", "")
    return made


@pytest.fixture
def run(host: Host, tmp_path: Path) -> Callable[..., int]:
    def run(*words: str, devices: tuple[str, ...] = (DISK,)) -> int:
        try:
            return run_program(devices, words, sysfs=host, state_dir=tmp_path / "state")
        finally:
            assert [host.state(bdf) for bdf in (DISK, NIC, SOUND)] == [
                ("nvme", None),
                ("e1000e", None),
                ("snd", None),
            ]
            assert not [*tmp_path.glob("state/journal/*")]

    return run


def test_placeholders() -> None:
    words = ("{vfio0}", "a={iommufd},fd={vfio1}", "{bdf0}", "{container}{group0}", '{"driver": "x"}', "${x}{vfio}{0}")
    made = Placeholders(words, 2)
    assert made.of_iommufd == ["{iommufd}", "{vfio1}"]
    numbers = {"iommufd": 3, "vfio0": 4, "vfio1": 5, "container": 6, "group0": 7}
    bdfs = [Bdf.parse(DISK), Bdf.parse(NIC)]
    assert made.filled(numbers, bdfs) == ["{vfio0}", "a=3,fd=5", DISK, "67", '{"driver": "x"}', "${x}{vfio}{0}"]
    for word in ("{vfio2}", "x{group2}", "{bdf10}"):
        with pytest.raises(ProgramError, match=r"is in the arguments, and the number of devices is 2"):
            Placeholders(("program", word), 2)


def test_the_program_has_the_devices_and_the_descriptors(
    host: Host, run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "host"
    script = f"""for fd; do [ -e $fd ] || readlink /proc/self/fd/$fd; done; ls /proc/self/fd | wc -l
        basename $(readlink {place}/sys/bus/pci/devices/{NIC}/driver); exit 7"""
    before = len([*Path("/proc/self/fd").iterdir()])
    fds = ("{iommufd}", "{vfio0}", "{vfio1}", "{container}", "{group1}", "{group2}", "{iommufd}")
    assert run("sh", "-c", script, "sh", *fds, devices=(DISK, NIC, SOUND)) == 7
    lines = capfd.readouterr().out.splitlines()
    iommu, *nodes = (
        f"{place}/dev/{name}" for name in ("iommu", "vfio/devices/vfio0", "vfio/devices/vfio1", "vfio/vfio")
    )
    assert lines == [iommu, *nodes, f"{place}/dev/vfio/8", f"{place}/dev/vfio/8", iommu, str(3 + 5 + 1), "vfio-pci"]
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_exit_statuses(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("true") == 0
    assert run("sh", "-c", "kill -9 $$") == 128 + 9
    assert run("sh", "-c", "exit 255") == 255
    (tmp_path / "text").write_text("text")
    for name, status, reason in ((tmp_path / "text", 126, "not executable"), ("no-such-program", 127, "not found")):
        with pytest.raises(ProgramError, match=reason) as refused:
            run(str(name))
        assert refused.value.exit_status == status
    (tmp_path / "text").chmod(0o755)
    (tmp_path / "text").write_bytes(b"\x7fELF")
    with pytest.raises(OSError, match="Exec format error"):
        run(str(tmp_path / "text"))
    with pytest.raises(BadAddress):
        run("true", devices=("here",))


@pytest.mark.parametrize("lacks", ["dev/iommu", "sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio0"])
def test_a_kernel_without_iommufd(host: Host, run: Callable[..., int], lacks: str) -> None:
    """Named before or after the devices are bound, and nothing is started; type 1 is possible."""
    if lacks == "dev/iommu":
        host.path(lacks).unlink()
    else:
        host.path(lacks, "dev").unlink()
        host.path(lacks).rmdir()
    with pytest.raises(HostNotReady, match=r"\{iommufd\} and \{vfio0\} cannot be opened: this kernel"):
        run("false", "{iommufd}", "{vfio0}")
    assert run("true", "{container}", "{group0}") == 0


def qemu(directory: Path, name: str, answer: str) -> str:
    file = directory / name
    file.write_text(f"#!/bin/sh\n[ \"$*\" = '-object help' ] || exit 3\n{answer}\n")
    file.chmod(0o755)
    return str(file)


def test_a_qemu_that_does_not_know_iommufd(run: Callable[..., int], tmp_path: Path, host: Host) -> None:
    old = qemu(tmp_path, "qemu-system-x86_64", "echo List of user creatable objects:; echo '  memory-backend-ram'")
    for words in ((old,), ("env", old)):
        with pytest.raises(ProgramError, match=rf"^{old} does not know iommufd: .* QEMU 9\.0") as refused:
            run(*words, "-object", "iommufd,fd={iommufd}")
        assert (refused.value.exit_status, host.writes) == (125, [])
    assert run(old, "host={bdf0}") == 3
    new = qemu(tmp_path, "qemu-system-aarch64", "echo '  iommufd'; echo '  memory-backend-ram'")
    odd = qemu(tmp_path, "qemu-kvm", "exit 1")
    for name in (new, odd):  # one that does not say is started
        assert run(name, "{iommufd}") == 3


def test_a_device_that_cannot_be_borrowed(host: Host, run: Callable[..., int]) -> None:
    host.add("0000:03:00.0", "nvme")
    with pytest.raises(NotAssignable, match="no IOMMU group"):
        run("true", devices=("0000:03:00.0",))


# --- signals

STARTER = """
import os, signal, sys
from kvmpass.host import program
class Device: pass
class Borrowed:
    def __enter__(self): return []
    def __exit__(self, *error): print("rebound", flush=True)
program.borrow = lambda *arguments, **options: Borrowed()
sys.exit(program.run_program(["01:00.0"], sys.argv[1:]))
"""


def start(script: str, **options: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", STARTER, "sh", "-c", script]
    process: subprocess.Popen[str] = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("usual_signals")
def test_signals_are_forwarded(number: signal.Signals) -> None:
    """The program ends as it likes; one that dies of it gives the status that a shell would."""
    with start(f"trap 'echo caught; exit 5' {number.name[3:]}; echo ready; while :; do sleep 0.05; done") as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (5, "caught\nrebound\n")
    with start("echo ready; exec sleep 60") as process:
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + number, "rebound\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.usefixtures("usual_signals")
def test_the_terminals_signals_are_the_programs(number: signal.Signals) -> None:
    """To the whole group it is the program that ends; sent to kvmpass alone it ends nothing."""
    with start(
        f"trap 'exit 6' {number.name[3:]}; echo ready; while :; do sleep 0.05; done", process_group=0
    ) as process:
        os.kill(process.pid, number)
        time.sleep(0.3)
        assert process.poll() is None
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (6, "rebound\n")


@pytest.mark.usefixtures("usual_signals")
def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    options = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with start("echo ready; kill -HUP $$; exec sleep 0.5", **options) as process:
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "rebound\n")


def test_a_signal_before_the_start_is_not_lost(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def late(*arguments: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)  # type: ignore[call-overload]

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        monkeypatch.setattr(program.subprocess, "Popen", late)
        assert run("sleep", "60") == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_no_signal_is_touched(run: Callable[..., int]) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(run("sh", "-c", "exit 4")))
    thread.start()
    thread.join()
    assert found == [4]
