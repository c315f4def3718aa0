"""The measurements of ``make bench``, inside a host with AMD-V and AMD-Vi: ``inside.py BASELINE ROUNDS RESULT``.

Programs take turns in each round, so that what else the machine does meets them alike. Each value is one sample;
units are in the names of the rows.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmpass import host
from kvmpass._native import lib
from kvmpass.guest import GuestSpec, prepare
from kvmpass.ports import SERIAL_LINES

KVMPASS = [sys.executable, "-m", "kvmpass"]
SIZES = (256, 1024, 2048)
CONFIG_READS, DRIVE_MIB = 5, 64
SCRIPT = f"""
at() {{ read -r up rest </proc/uptime; echo "$1 $up"; }}
at start
for i in {" ".join(map(str, range(CONFIG_READS)))}; do cat /sys/class/nvme/nvme0/device/config >/dev/null; done
at config
dd if=/dev/nvme0n1 of=/dev/null bs=1M count={DRIVE_MIB} 2>/dev/null
at drive
"""
KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY = 0xAE03, 3
CALLS = 20000

samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
counts: dict[str, object] = {}


def note(row: str, program: str, value: float) -> None:
    """Record a sample."""
    samples[row][program].append(value)
    print(f"{row}: {program}: {value:.4g}", flush=True)


def spent(words: list[str]) -> float:
    """Run a program; return its CPU time in milliseconds."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, words
    return (used.ru_utime + used.ru_stime) * 1000


def timed_guest(program: str, output: str) -> None:
    """Record what the guest's script has printed."""
    at = {word: float(seconds) for word, seconds in (line.split() for line in output.splitlines() if line)}
    note("configuration space of the device, reads in the guest, s", program, at["config"] - at["start"])
    note(f"drive, {DRIVE_MIB} MiB in sequence, s", program, at["drive"] - at["config"])


def assign(bdf: str, memory: int, script: str, *options: str) -> tuple[dict[str, Any], str, int]:
    """Run ``kvmpass assign``; return its timings, its output, and its largest resident size in KiB."""
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder, "status")
        words = ["assign", "--memory", f"{memory}M", "--backend", "type1", "--timings", "--status-file", str(status)]
        child = subprocess.Popen(
            [*KVMPASS, *words, *options, bdf, "--", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdout is not None
        output = child.stdout.read()
        _, code, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(code)
        return json.loads(status.read_text())["timings"], output, used.ru_maxrss


def until(timings: dict[str, Any], stage: str) -> float:
    """Return the seconds from the start of the process to the end of a stage."""
    total = 0.0
    for found in timings["stages"]:
        total += float(found["seconds"])
        if found["name"] == stage:
            return total
    raise LookupError(stage)


def guest_of_kvmpass(bdf: str) -> None:
    """Boot a guest that runs the script."""
    timings, output, resident = assign(bdf, 256, SCRIPT)
    note("first process of the guest, s", "kvmpass", until(timings, "guest's boot"))
    note("resident beyond 256 MiB of the guest, MiB", "kvmpass", resident / 1024 - 256)
    timed_guest("kvmpass", output)
    counts["a guest with a drive"] = timings


def guest_of_qemu(bdf: str) -> None:
    """Boot the same kernel and the same files in QEMU's q35 machine; its serial ports carry the output."""
    image = prepare(GuestSpec(command=("sh", "-c", SCRIPT)), [host.Sysfs().device(host.Bdf.parse(bdf)).modalias])
    image = image.on_serial_ports()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "initrd").write_bytes(image.initrd)
        words = [*QEMU, "-m", "256M", "-kernel", image.kernel.path, "-initrd", str(folder / "initrd")]
        words += ["-append", image.cmdline, "-device", f"vfio-pci,host={bdf}"]
        for index, line in enumerate(SERIAL_LINES):
            words += ["-chardev", f"file,id=serial{index},path={folder / f'serial{index}'}"]
            place = f"iobase={line.port:#x},irq={line.irq},index={index}"
            words += ["-device", f"isa-serial,chardev=serial{index},{place}"]
        started = time.monotonic()
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            control = folder / "serial3"
            while not control.exists() or b"ready" not in control.read_bytes():
                assert child.poll() is None and time.monotonic() < started + 120, (folder / "serial0").read_text()
                time.sleep(0.01)
            note("first process of the guest, s", "QEMU", time.monotonic() - started)
            _, _, used = os.wait4(child.pid, 0)
            child.returncode = 0
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()
        note("resident beyond 256 MiB of the guest, MiB", "QEMU", used.ru_maxrss / 1024 - 256)
        timed_guest("QEMU", (folder / "serial1").read_text())


QEMU = ["qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-cpu", "host"]
QEMU += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]


def attach_with_kvmpass(bdf: str, size: int) -> float:
    """Assign the device; the guest ends as soon as it is started."""
    timings, _, _ = assign(bdf, size, "true", "--timeout", "0.01")
    return until(timings, "assignment")


def attach_with_qemu(bdf: str, size: int) -> float:
    """Start QEMU with the device, its CPUs stopped, until it answers."""
    words = [*QEMU, "-m", f"{size}M", "-S", "-device", f"vfio-pci,host={bdf}", "-qmp", "stdio"]
    started = time.monotonic()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b'{"execute": "qmp_capabilities"}\n')
        child.stdin.flush()
        assert b"QMP" in child.stdout.readline() and b"return" in child.stdout.readline()
        seconds = time.monotonic() - started
        child.communicate(b'{"execute": "quit"}\n')
    return seconds


def attach_in_c(baseline: str, bdf: str, size: int) -> float:
    """Run the baseline."""
    group = Path(f"/sys/bus/pci/devices/{bdf}/iommu_group").resolve().name
    started = time.monotonic()
    with subprocess.Popen([baseline, group, bdf, str(size)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"attached\n"
        return time.monotonic() - started


def calls(call: Callable[[], object]) -> float:
    """Return nanoseconds of one call."""
    started = time.monotonic_ns()
    for _ in range(CALLS):
        call()
    return (time.monotonic_ns() - started) / CALLS


def layers(baseline: str) -> None:
    """Measure one ioctl through each layer."""
    row = "one ioctl (KVM_CHECK_EXTENSION), ns"
    with Path("/dev/kvm").open("rb+", buffering=0) as kvm:
        fd, libc = kvm.fileno(), ctypes.CDLL(None)
        note(row, "kvmpass", calls(lambda: lib.kvm_check_extension(fd, KVM_CAP_USER_MEMORY)))
        note(row, "fcntl.ioctl", calls(lambda: fcntl.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY)))
        note(row, "ctypes", calls(lambda: libc.ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY)))
    done = subprocess.run([baseline, "ioctl", str(CALLS)], capture_output=True, text=True, check=True)
    note(row, "C", float(done.stdout))


def main(baseline: str, rounds: str, result: str) -> None:
    """Measure, and write everything to ``result``."""
    sysfs = host.Sysfs()
    bdf = next(str(device.bdf) for device in sysfs.devices() if device.class_code == 0x010802)
    host.bind([bdf])  # until the host ends, or kvmpass unbind
    try:
        for number in range(int(rounds)):
            jobs: list[Callable[[], object]] = [lambda: guest_of_kvmpass(bdf), lambda: guest_of_qemu(bdf)]
            for size in SIZES:
                row = f"process start to attached, {size} MiB, s"
                jobs += [
                    lambda size=size, row=row: note(row, "kvmpass", attach_with_kvmpass(bdf, size)),  # type: ignore[misc]
                    lambda size=size, row=row: note(row, "QEMU", attach_with_qemu(bdf, size)),  # type: ignore[misc]
                    lambda size=size, row=row: note(row, "C", attach_in_c(baseline, bdf, size)),  # type: ignore[misc]
                ]
            jobs += [
                lambda: note("CPU of --help, ms", "kvmpass", spent([*KVMPASS, "--help"])),
                lambda: note("CPU of --help, ms", "import click", spent([sys.executable, "-c", "import click"])),
                lambda: note("CPU of list, ms", "kvmpass", spent([*KVMPASS, "list"])),
                lambda: note("CPU of list, ms", "import click", spent([sys.executable, "-c", "import click"])),
                lambda: layers(baseline),
            ]
            for job in jobs if number % 2 == 0 else reversed(jobs):
                job()
            Path(result).write_text(json.dumps({"rounds": number + 1, "samples": samples, "counts": counts}))
    finally:
        host.unbind([bdf])


if __name__ == "__main__":
    main(*sys.argv[1:])
