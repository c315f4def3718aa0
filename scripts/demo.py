"""The main job, shown and checked: a Linux guest reads and writes an NVMe drive through AMD-Vi.

On the emulated host, or, with KVMPASS_TEST_NVME=BDF on a host that has AMD-Vi, on a real drive, which is only read
unless KVMPASS_TEST_DESTRUCTIVE=1. Exit status 0 if everything that was shown is true.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvmpass import host
from kvmpass.lab import Lab, LabConfig

MIB = 1 << 20
READ = 32 * MIB
DRIVE = 64 * MIB
MARKER_AT = 48 * MIB
MARKER = b"written by a guest, through AMD-Vi"
BDF_IN_LAB = "0000:00:04.0"

GUEST = """
uname -a
nproc
grep nvme0q1 /proc/interrupts
echo "sha256 $(dd if=/dev/nvme0n1 bs=1M count=32 2>/dev/null | sha256sum)"
"""
WRITE = f"""
printf '%s' '{MARKER.decode()}' | dd of=/dev/nvme0n1 bs=512 seek={MARKER_AT // 512} conv=notrunc,fsync 2>/dev/null
"""


class Tee:
    """Shows what comes, and keeps it."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return len(data)

    def flush(self) -> None:
        pass


def say(text: str) -> None:
    print(f"--- {text}", flush=True)


def command(bdf: str, script: str) -> list[str]:
    assign = [sys.executable, "-m", "kvmpass", "assign", "-v", bdf, "--memory", "512M", "--append", "quiet"]
    return [*assign, "--", "sh", "-c", f"set -e{script}"]


def check(what: str, holds: bool) -> bool:
    say(f"{what}: {'ok' if holds else 'FAILED'}")
    return holds


def told_by_guest(output: bytes, expected: str) -> bool:
    match = re.search(rb"^sha256 ([0-9a-f]{64})", output, re.MULTILINE)
    return match is not None and match[1].decode() == expected


def in_lab() -> bool:
    say("emulated AMD-Vi host (KVMPASS_TEST_NVME=BDF names a drive of a real one)")
    with tempfile.TemporaryDirectory(prefix="kvmpass-demo-") as directory:
        drive = Path(directory) / "drive"
        drive.write_bytes(os.urandom(READ) + bytes(DRIVE - READ))
        expected = hashlib.sha256(drive.read_bytes()[:READ]).hexdigest()
        say(f"a drive with {READ // MIB} MiB of random bytes, sha256 {expected}")
        kernel = "full" if os.environ.get("KVMPASS_LAB_KERNEL") else "stock"
        lab = Lab(LabConfig(devices=(f"nvme,file={drive}",), kernel=kernel, timeout=600), say=say)
        seen = Tee()
        inner = " ".join(map(shlex.quote, command(BDF_IN_LAB, GUEST + WRITE)))
        where = f"/sys/bus/pci/devices/{BDF_IN_LAB}/driver"
        started = time.monotonic()
        say(f"booting the host (kernel: {kernel}), then in it: {inner.splitlines()[0]} …")
        result = lab.run(
            ["sh", "-c", f"{inner}; status=$?; echo driver $(basename $(readlink {where})); exit $status"],
            stdout=seen,
            stderr=seen,
        )
        say(f"the host ended after {time.monotonic() - started:.0f} s: {result.summary}")
        if result.outcome != "exited":
            print(result.console_tail)
        contents = drive.read_bytes()
        return all(
            [
                check("the guest's command succeeded", result.status == 0),
                check("sha256 in the guest equals the drive file's", told_by_guest(bytes(seen.data), expected)),
                check("the guest's marker is in the drive file", contents[MARKER_AT:].startswith(MARKER)),
                check("every other byte is as it was", hashlib.sha256(contents[:READ]).hexdigest() == expected),
                check("audit: ok, before the guest ran", b"audit: ok" in seen.data),
                check("the drive is rebound to nvme", b"driver nvme" in seen.data),
            ]
        )


def on_hardware(bdf: str) -> bool:
    destroy = os.environ.get("KVMPASS_TEST_DESTRUCTIVE") == "1"
    say(f"real AMD-Vi: drive {bdf}, {'read and written' if destroy else 'only read'}")
    node = next(Path(f"/sys/bus/pci/devices/{bdf}").glob("nvme/nvme*/nvme*n1"), None)
    if node is None:
        say(f"{bdf} is no NVMe drive under the driver nvme")
        return False
    with Path("/dev", node.name).open("rb") as file:
        expected = hashlib.sha256(file.read(READ)).hexdigest()
    result = subprocess.run(command(bdf, GUEST + (WRITE if destroy else "")), stdout=subprocess.PIPE, check=False)
    sys.stdout.buffer.write(result.stdout)
    driver = host.Sysfs().device(host.Bdf.parse(bdf)).driver
    return all(
        [
            check("the guest's command succeeded", result.returncode == 0),
            check("sha256 in the guest equals the host's", told_by_guest(result.stdout, expected)),
            check("the drive is rebound to nvme", driver == "nvme"),
        ]
    )


def main() -> int:
    bdf = os.environ.get("KVMPASS_TEST_NVME")
    return 0 if (on_hardware(bdf) if bdf else in_lab()) else 1


if __name__ == "__main__":
    sys.exit(main())
