"""Linux guests: hardware, outcomes, output."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.guests import GUEST_SECONDS, boot, kvmpass, run

from kvmpass import Session, host
from kvmpass.boot import mtrr
from kvmpass.boot.linux import KernelImage
from kvmpass.boot.unpacking import Unpacking
from kvmpass.cli.main import main
from kvmpass.errors import GuestError
from kvmpass.guest import Guest, GuestSpec, prepare
from kvmpass.guest.kernel import host_kernel
from kvmpass.machine import GuestOutcome, Machine

Valid = Callable[[str, str | bytes], Any]

pytestmark = [pytest.mark.amdvi(duration=12), pytest.mark.usefixtures("as_without_tests")]
MOST_EXITS = 500
"""Of a guest with a drive and a console, from its start to its command."""
HEAD = 16 << 20  # bytes at the start of a drive that are compared: a real one may be large
SINGLE_READS = 200
HASH_HEAD = f"dd if=/dev/nvme0n1 bs=1M count={HEAD >> 20} 2>/dev/null | sha256sum"


def driver(bdf: str) -> str | None:
    return host.Sysfs().device(host.Bdf.parse(bdf)).driver


def node(bdf: str) -> Path:
    """The block device of an NVMe drive that the host has; it takes a moment after the driver is bound."""
    deadline = time.monotonic() + 30
    while not (found := list(Path(f"/sys/bus/pci/devices/{bdf}").glob("nvme/nvme*/nvme*n1"))):
        assert time.monotonic() < deadline, "the drive has not come back"
        time.sleep(0.05)
    while not (path := Path("/dev") / found[0].name).exists():
        time.sleep(0.05)
    return path


def head(bdf: str) -> bytes:
    with node(bdf).open("rb") as drive:
        return drive.read(HEAD)


def interrupts(text: str) -> int:
    """The sum of the counts in lines of /proc/interrupts."""
    lines = re.findall(r"^ *\d+:(.*)", text, re.MULTILINE)
    return sum(int(number) for line in lines for number in re.findall(r" (\d+)(?= )", line))


# --- with an assigned drive


def test_output_and_status_are_the_commands(nvme: str) -> None:
    result = run("assign", nvme, "--memory", "256M", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    assert driver(nvme) == "nvme"


def test_the_guest_reads_and_writes_the_drive(nvme: str, tmp_path: Path, destructive: None, valid: Valid) -> None:
    """Every byte through the IOMMU, both ways, compared from outside; a program and a file copied in."""
    before = os.urandom(HEAD)
    node(nvme).write_bytes(before)
    marker = os.urandom(4096)
    (tmp_path / "marker").write_bytes(marker)
    script = f"set -e; {HASH_HEAD.replace('sha256sum', '/opt/sha256sum')}; "
    script += "dd if=/opt/marker of=/dev/nvme0n1 bs=4096 seek=3 conv=fsync; "
    script += (
        f"dd if=/dev/nvme0n1 of=/dev/null bs=4096 count={SINGLE_READS} iflag=direct; grep nvme0q /proc/interrupts"
    )
    result = run(
        *("assign", nvme, "--memory", "256M", "--timings", "--status-file", str(tmp_path / "status.json")),
        *("--copy", f"{shutil.which('sha256sum')}:/opt/sha256sum", "--copy", f"{tmp_path}/marker:/opt/marker"),
        *("--", "sh", "-c", script),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0].decode() == hashlib.sha256(before).hexdigest()
    assert head(nvme) == before[: 3 * 4096] + marker + before[4 * 4096 :]
    report = valid("status-file", (tmp_path / "status.json").read_text())
    assert (report["schema"], report["outcome"], report["guest_exit_status"], report["exit_status"]) == (
        2,
        "exited",
        0,
        0,
    )
    assert report["bdfs"] == [nvme]
    stages = {stage["name"]: stage for stage in report["timings"]["stages"]}
    print(json.dumps(report["timings"]))
    assert [*stages][-4:] == ["guest's boot", "command", "power off", "rebinding"]
    assert stages["guest's boot"]["exits"] <= MOST_EXITS, report["timings"]["accesses"]
    assert interrupts(result.stdout.decode()) > SINGLE_READS
    assert stages["command"]["exits"] < 50, "16 MiB from the drive, 4 KiB to it, hundreds of interrupts"
    assert all(f"kvmpass: {count}" in result.stderr.decode() for count in ("seconds", "  reads"))


HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def test_too_few_huge_pages_are_refused_before_anything_changes(nvme: str) -> None:
    free = int(HUGE_PAGES.read_text())
    size = 2 * free + 2
    result = run("assign", nvme, "--memory", f"{size}M", "--hugepages", "2M", "--", "true")
    assert (result.returncode, driver(nvme)) == (125, "nvme")
    complaint = f"the guest needs {size} MiB of 2048 KiB pages, {2 * free} MiB of them are free"
    assert complaint in result.stderr.decode()


def test_a_guest_on_the_huge_pages_that_are_free(nvme: str) -> None:
    free = int(HUGE_PAGES.read_text())
    if free < 48:
        pytest.skip(f"{free} huge pages of 2 MiB are free: 48 make it run (hugepages=48 at boot)")
    options = ("-v", "--append", "quiet")  # not the whole boot on the console: that takes 20 s
    result = run("assign", *options, nvme, "--memory", "96M", "--hugepages", "auto", "--", "sh", "-c", HASH_HEAD)
    assert result.returncode == 0, result.stderr
    chosen = f"1 GiB pages: 96 MiB is not a multiple; 2 MiB pages: {2 * free} MiB free, 96 MiB wanted"
    assert f"kvmpass: backing hugetlb-2M: {chosen}" in result.stderr.decode()
    assert b"96 MiB, hugetlb-2M, read-write" in result.stderr
    if os.environ.get("KVMPASS_LAB"):  # elsewhere the kernel may be compressed in a way that Python does not know
        assert b"kvmpass: kernel loaded as a vmlinux" in result.stderr
    assert result.stdout.split()[0].decode() == hashlib.sha256(head(nvme)).hexdigest()


@pytest.mark.amdvi(duration=35)
def test_two_guests_at_once_and_a_third_is_refused(nvme: str, nvme2: str, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"{HASH_HEAD}; echo ready; cat"
    with ExitStack() as undo:
        guests = []
        for bdf in (nvme, nvme2):
            guest = subprocess.Popen(
                kvmpass("assign", "-i", bdf, "--memory", "192M", "--", "sh", "-c", script),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            undo.enter_context(guest)  # closes its input, and waits
            undo.callback(guest.terminate)  # does nothing once it has ended
            guests.append(guest)
        lines = []
        for guest in guests:
            assert guest.stdout
            lines.append(guest.stdout.readline())
        with pytest.raises(SystemExit) as ended:
            main(["assign", nvme, "--", "true"])
        assert ended.value.code == 125
        complaint = capfd.readouterr().err.splitlines()[0]
        assert re.fullmatch(rf"kvmpass: {nvme} is assigned by process {guests[0].pid} \(.+\)", complaint), complaint
        assert (driver(nvme), driver(nvme2)) == ("vfio-pci", "vfio-pci")
        for guest, bdf, line in zip(guests, (nvme, nvme2), lines, strict=True):
            assert guest.stdin and guest.stdout and guest.stderr
            guest.stdin.close()  # the end of cat
            assert (guest.stdout.read(), guest.wait(GUEST_SECONDS)) == ("ready\n", 0), guest.stderr.read()
            assert line.split()[0] == hashlib.sha256(head(bdf)).hexdigest()


def test_a_guest_that_panics_has_no_status(nvme: str, tmp_path: Path, valid: Valid) -> None:
    status = tmp_path / "status.json"
    crash = "echo before; echo c > /proc/sysrq-trigger"
    result = run("assign", nvme, "--memory", "192M", "--status-file", str(status), "--", "sh", "-c", crash)
    assert (result.returncode, result.stdout) == (126, b"before\n")
    assert b"the guest panicked before its command reported a status" in result.stderr
    assert b"Kernel panic - not syncing: sysrq triggered crash" in result.stderr
    report = valid("status-file", status.read_text())
    assert (report["outcome"], report["guest_exit_status"], report["exit_status"]) == ("panic", None, 126)
    assert driver(nvme) == "nvme"


def test_the_console_is_a_terminal(nvme: str) -> None:
    """A shell on a pseudo-terminal: Ctrl-C reaches the guest, Ctrl-] ends it, the terminal is restored.

    Its size is the guest's; when it changes, the guest's foreground process gets SIGWINCH.
    """
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    termios.tcsetwinsize(master, (30, 100))
    command = kvmpass("assign", nvme, "--memory", "192M", "--append", "quiet")
    process = subprocess.Popen(["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave)
    seen = b""

    def expect(text: bytes, seconds: float = 120) -> None:
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        seen = seen.partition(text)[2]

    try:
        expect(b"Ctrl-] ends the guest")
        expect(b"# ")
        os.write(master, b"sh -c 'echo sl''eeping; exec sleep 1000'\n")
        expect(b"sleeping")
        os.write(master, b"\x03")
        os.write(master, b"echo status-$?; ls /dev/nvme0n1\n")
        expect(b"status-130")
        expect(b"/dev/nvme0n1")
        os.write(master, b"stty size\n")
        expect(b"30 100")
        os.write(master, b"sh -c 'trap \"stty size; exit\" WINCH; echo wai''ting; while :; do sleep 1; done'\n")
        expect(b"waiting")
        termios.tcsetwinsize(master, (50, 140))
        expect(b"50 140")
        os.write(master, b"stty size; echo en''d\n")
        expect(b"50 140")
        expect(b"end")
        os.write(master, b"\x1d")
        assert process.wait(60) == 0
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
    assert driver(nvme) == "nvme"


# --- one guest with two CPUs, a drive if there is one, and memory above 4 GiB, which takes long to make

NO_SYSCTL = "kernel.kvmpass=1"
TWO_CPUS = pytest.mark.guest(
    devices=("nvme?",), cpus=2, memory="3584M", append=f"sysctl.{NO_SYSCTL}", reuse="module", boot_timeout=200.0
)


def said(guest: Session, script: str) -> list[str]:
    """The lines that a script prints."""
    done = guest.run(["sh", "-ec", script], text=True, check=True, timeout=GUEST_SECONDS)
    return str(done.stdout).splitlines()


@pytest.fixture
def digest(nvme: str) -> str:
    """Of the drive's content, read by the host: before the guest has the drive."""
    return hashlib.sha256(head(nvme)).hexdigest()


@TWO_CPUS
@pytest.mark.amdvi(duration=30)
def test_two_cpus_and_memory_above_4_gib(digest: str, kvmpass_guest: Session) -> None:
    """The first of this guest's tests: it boots here."""
    script = f"nproc; grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem; {HASH_HEAD}"
    lines = said(kvmpass_guest, script)
    assert lines[0] == "2"
    assert int(lines[1].split()[1]) > 3_300_000
    assert any(line.startswith("100000000-11fffffff") for line in lines), lines
    assert lines[-1].split()[0] == digest


@TWO_CPUS
@pytest.mark.amdvi(duration=2)
def test_interrupts_are_msi_x(nvme: str, kvmpass_guest: Session) -> None:
    lines = said(kvmpass_guest, "dd if=/dev/nvme0n1 of=/dev/null bs=1M count=2; grep nvme0q /proc/interrupts")
    assert len(lines) >= 2
    for line in lines:
        assert "PCI-MSIX" in line or "PCI-MSI" in line
    assert interrupts("\n".join(lines)) > 0


@TWO_CPUS
@pytest.mark.amdvi(duration=2)
def test_hardware_of_the_guest(kvmpass_guest: Session) -> None:
    """Two CPUs, kvm-clock, no PIT and no 8259, a PCI root; the kernel reports no error."""
    script = """nproc; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
        cat /proc/interrupts; ls /sys/bus/pci/devices; dmesg -r | grep '^<[0-3]>' || true"""
    lines = said(kvmpass_guest, script)
    text = "\n".join(lines)
    assert lines[:2] == ["2", "kvm-clock"]
    assert "timer" not in re.findall(r"IO-APIC.*", text)
    assert "XT-PIC" not in text
    assert "0000:00:00.0" in text
    lacking = r"SVM not supported|No config space access function found"  # on purpose: ECAM is found later
    errors = [line for line in lines if re.match(r"<[0-3]>", line) and not re.search(lacking, line)]
    assert len(errors) == 1
    assert NO_SYSCTL in errors[0], "the parameter that the guest was given"
    console = kvmpass_guest.console
    assert errors[0].removeprefix("<3>") in console, "printed by init, as it came before"
    assert not re.search(lacking, console)


@TWO_CPUS
@pytest.mark.amdvi(duration=2)
def test_every_cpu_has_the_mtrrs_of_firmware(kvmpass_guest: Session) -> None:
    machine = kvmpass_guest.machine
    wanted = mtrr.mtrrs(machine._system.physical_bits)
    assert len(machine.vcpus) == 2
    assert wanted[mtrr.DEF_TYPE] & 0xFF == mtrr.WRITE_BACK
    machine.pause(30)
    try:
        for vcpu in machine.vcpus:
            assert vcpu.get_msrs(list(wanted)) == wanted
            with pytest.raises(OSError, match=r"KVM_GET_MSRS: Invalid argument \(vCPU .*MSR 0xdead\)"):
                vcpu.get_msrs([mtrr.DEF_TYPE, 0xDEAD])
    finally:
        machine.resume()


# --- without any device


@pytest.mark.parametrize(
    ("command", "append", "outcome"),
    [
        ("poweroff -f", "", GuestOutcome.POWEROFF),
        ("reboot -f", "", GuestOutcome.REBOOT),
        ("echo c > /proc/sysrq-trigger", "", GuestOutcome.PANIC),
        ("reboot -f", "reboot=t", GuestOutcome.TRIPLE_FAULT),
    ],
    ids=["poweroff", "reboot", "panic", "triple-fault"],
)
def test_each_outcome_is_recognized(command: str, append: str, outcome: GuestOutcome, tmp_path: Path) -> None:
    """In guests whose kernel was decompressed here, decompresses itself, or never was compressed."""
    kernel = None
    if outcome is GuestOutcome.TRIPLE_FAULT and (content := Unpacking(KernelImage.from_file(host_kernel())).take()):
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(b"".join(bytes(piece) for piece in content.pieces()))
    script = f"cat /proc/sys/kernel/osrelease; {command}; sleep 30"
    itself = outcome is GuestOutcome.PANIC
    result, output = boot("sh", "-c", script, append=append, kernel=kernel, decompressed=not itself)
    assert (result.outcome, result.status) == (outcome, None)
    assert output.decode().strip() == os.uname().release


def test_end_of_input_ends_a_shell(nvme: str) -> None:
    """Commands in a pipe, without an `exit`; a program among them reads to the end, too. The boot is quiet."""
    command = kvmpass("assign", nvme, "--memory", "192M")
    for commands in ("", "echo sum $((40 + 2)); cat\nof cat\n"):
        result = subprocess.run(
            command, input=commands.encode(), capture_output=True, timeout=GUEST_SECONDS, check=False
        )
        text = result.stdout.decode(errors="replace")
        assert result.returncode == 0, result.stderr
        assert "Linux version" not in text
        assert ("sum 42" in text) == bool(commands), text
    assert driver(nvme) == "nvme"


def test_programs_find_their_streams_and_the_kernels_own_file_systems() -> None:
    script = """echo in | cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr
        ls /dev/fd/ | grep -c '^[012]$'
        for name in debug tracing; do
            [ ! -d /sys/kernel/$name ] || grep -q " /sys/kernel/$name [a-z]*fs " /proc/mounts || echo no $name
        done"""
    result, output = boot("sh", "-c", script)
    assert result.status == 0
    assert sorted(output.decode().splitlines()) == ["3", "err", "in", "out"]


def test_pause_registers_and_nmi() -> None:
    """A guest that counts stops while it is paused. An NMI injected then is delivered when it resumes."""
    said = bytearray()
    script = "n=0; while [ $n -lt 100000 ]; do n=$((n + 1)); echo $n; grep NMI /proc/interrupts; done"
    image = prepare(GuestSpec(command=("sh", "-c", script), append="nmi_watchdog=0"), [])
    with (
        Machine(memory="192M", cpus=2) as machine,
        Guest(machine, console=None, output=said.extend, errors=said.extend) as guest,
    ):
        with pytest.raises(GuestError, match="does not run"):
            machine.pause()
        with pytest.raises(GuestError, match="serial ports are connected"):
            Guest(machine, console=None, output=said.extend, errors=said.extend)
        image.load(machine)
        thread = threading.Thread(target=guest.run)
        thread.start()
        deadline = time.monotonic() + 120
        while b"NMI: " not in said:
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
        machine.pause(30)
        length, exits = -1, machine.exit_reasons
        while length != len(said):  # what it has sent is on its way
            length = len(said)
            time.sleep(0.5)
        control = [vcpu.get_sregs() for vcpu in machine.vcpus]
        assert len(control) == 2 and all(sregs["cr0"] >> 31 and sregs["efer"] >> 10 & 1 for sregs in control), (
            "long mode"
        )
        assert any(vcpu.get_regs()["rip"] for vcpu in machine.vcpus)
        machine.inject_nmi(1)
        with pytest.raises(IndexError):
            machine.inject_nmi(2)
        time.sleep(1)
        assert (len(said), machine.exit_reasons) == (length, exits)
        machine.resume()
        while not re.search(rb"NMI: +0 +1 ", said[length:]):
            assert time.monotonic() < deadline, said[-500:]
            time.sleep(0.02)
        assert machine.exit_reasons["Port"] > 100
        machine.stop()
        thread.join(30)
        assert not thread.is_alive()
