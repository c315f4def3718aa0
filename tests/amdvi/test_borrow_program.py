"""``kvmpass borrow``: programs of the host with borrowed devices and their descriptors, QEMU among them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.drivers import SYSFS, facts, look, until
from support.inside import drive_of
from support.living import FUNCTIONS
from support.qemu_guest import qemu_words

from kvmpass.errors import LabError
from kvmpass.guest import GuestSpec, prepare
from kvmpass.host.kernel.processes import pids, start_time
from kvmpass.lab import qemu
from kvmpass.layout import MIB

FULL = pytest.mark.amdvi(kernel="full")
KVMPASS = (sys.executable, "-m", "kvmpass")
OLD_QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens: in the end every device of the host is as it was."""
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))
    before = facts()
    yield
    assert facts() == before
    assert not [*tmp_path.glob("state/journal/*")]


def kvmpass(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVMPASS, *words], capture_output=True, text=True, timeout=100, check=False)


def children(pid: int) -> list[int]:
    statuses = [(number, SYSFS.fields("proc", str(number), "status")) for number in pids(SYSFS)]
    return [number for number, status in statuses if status.get("PPid") == str(pid)]


def end(pid: int) -> None:
    """Kill a process of nobody's, and wait until its files are closed."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: start_time(SYSFS, pid) is None)


@FULL
def test_a_program_with_descriptors(edu: str, nvme: str) -> None:
    """Of both interfaces: it has those it asks for and no others, while its devices are bound to vfio-pci."""
    script = """for fd; do readlink /proc/self/fd/$fd; done; ls /proc/self/fd | wc -l
        for name in 0 1; do basename $(readlink /sys/bus/pci/devices/$(eval echo \\$bdf$name)/driver); done; exit 9"""
    words = ("env", "bdf0={bdf0}", "bdf1={bdf1}", "sh", "-c", script, "sh")
    groups = [look(bdf).group for bdf in (edu, nvme)]
    done = kvmpass("borrow", edu, nvme, "--", *words, "{container}", "{group0}", "{group1}")
    nodes = ["/dev/vfio/vfio", *(f"/dev/vfio/{group}" for group in groups)]
    assert (done.returncode, done.stdout.split()) == (9, [*nodes, "7", "vfio-pci", "vfio-pci"]), done.stderr
    done = kvmpass("borrow", edu, nvme, "--", *words, "{iommufd}", "{vfio1}")
    iommu, cdev, *rest = done.stdout.split()
    assert (done.returncode, iommu, rest) == (9, "/dev/iommu", ["6", "vfio-pci", "vfio-pci"]), done.stderr
    assert cdev.startswith("/dev/vfio/devices/vfio")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.usefixtures("usual_signals")
def test_it_is_ended(number: signal.Signals, edu: str) -> None:
    """A signal is the program's, too; after a SIGKILL the device is restored once the program has ended."""
    words = [*KVMPASS, "borrow", edu, "--", "sh", "-c", "echo $$; exec sleep 100", "{container}", "{group0}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        program = int(process.stdout.readline())
        assert look(edu).driver == "vfio-pci"
        process.send_signal(number)
        if number != signal.SIGKILL:
            assert process.wait(60) == 128 + number
            return
        assert process.wait(60) == -number
        done = kvmpass("restore")
        assert (done.returncode, done.stdout) == (
            1,
            f"{edu}: failed: {edu} is still open in process {program} (sleep)\n",
        )
        end(program)
    assert kvmpass("restore").stdout == f"{edu}: restored: driver none\n"


@FULL
def test_a_qemu_that_does_not_know_iommufd(edu: str) -> None:
    if not shutil.which(OLD_QEMU) or qemu.system().version >= (9, 0, 0):
        pytest.skip("this host's QEMU knows iommufd: it runs where it is before 9.0, such as Debian 12's 7.2")
    done = kvmpass("borrow", edu, "--", OLD_QEMU, "-object", "iommufd,id=iommu,fd={iommufd}")
    assert (done.returncode, done.stdout) == (125, "")
    cause, hint = done.stderr.splitlines()
    assert cause == (
        f"kvmpass: {OLD_QEMU} does not know iommufd: it has no -object iommufd, which came with QEMU 9.0"
    )
    assert hint.startswith("  hint: use a newer QEMU; or type 1, without {iommufd}")


@pytest.mark.amdvi(profile="stock")
def test_a_kernel_without_iommufd(nvme: str) -> None:
    done = kvmpass("borrow", nvme, "--", "false", "{iommufd}", "{vfio0}")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("kvmpass: {iommufd} and {vfio0} cannot be opened: this kernel has no /dev/iommu\n")
    assert kvmpass("borrow", nvme, "--", "true", "{group0}").returncode == 0


@FULL
@pytest.mark.amdvi(duration=25)
@pytest.mark.usefixtures("usual_signals")
def test_qemu_boots_the_same_guest_with_descriptors(
    nvme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destructive: None
) -> None:
    """It reads the drive; then both are killed, and the host is restored."""
    with monkeypatch.context() as patch:
        if cache := os.environ.get("KVMPASS_LAB_CACHE"):
            patch.setenv("KVMPASS_CACHE", cache)
        try:
            emulator = qemu.modern()
        except LabError as error:
            pytest.skip(f"{error}: {error.__notes__[0]}")
    data = os.urandom(MIB)
    drive_of(nvme).write_bytes(data)
    script = FUNCTIONS + "wait_for drive; dd if=$drive bs=64k count=16 2>/dev/null | sha256sum; sleep 1000"
    image = prepare(GuestSpec(command=("sh", "-c", script)), [look(nvme).modalias])
    words: Sequence[str] = qemu_words(emulator.prefix, image, tmp_path, "256M")
    words = [*words, "-object", "iommufd,id=iommu,fd={iommufd}"]
    words = [*words, "-device", "vfio-pci,id=nvme,iommufd=iommu,fd={vfio0}"]  # without an id QEMU 11.1 crashes
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    errors, output = tmp_path / "errors", tmp_path / "serial1"
    output.touch()
    with errors.open("w") as stderr:
        process = subprocess.Popen([*KVMPASS, "borrow", "-v", nvme, "--", *words], stderr=stderr)
    try:
        until(lambda: b"  -" in output.read_bytes() or process.poll() is not None, 200)
        assert process.poll() is None, errors.read_text()
        assert output.read_text().split()[0] == hashlib.sha256(data).hexdigest()
        (child,) = children(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        done = kvmpass("restore")
        assert (done.returncode, f"still open in process {child} " in done.stdout) == (1, True), done.stdout
        end(child)
    finally:
        for number in children(process.pid):
            end(number)
        process.kill()
        process.wait()
    assert kvmpass("restore").stdout == f"{nvme}: restored: driver nvme\n"
